"""Train a policy with TRL's PPO against a reward model. `python -m reward_recipes.ppo`."""

import json
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, ScriptArguments

from reward_recipes.pairs import encode_dialogues, encode_texts, load_tokenizer
from reward_recipes.policy.common import (
    PolicyArguments,
    check_lengths,
    load_policy,
    load_policy_tokenizer,
    parse_policy_recipe,
)
from reward_recipes.policy.log import PolicyLogCallback
from reward_recipes.policy.prompts import load_prompts
from reward_recipes.policy.reward_function import RewardFunction
from reward_recipes.policy.samples import Samples
from reward_recipes.run import UserError, fit_to_device, output, renamed_fields_unwarned
from reward_recipes.score import Scorer, load_scorer, max_positions, peft_config

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns that newer versions differ: the reason for the extra
try:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.utils import get_reward
except ImportError as error:
    advice = "PPO needs TRL 1.12, the last release that has it: pip install 'reward-recipes[ppo]'"
    raise ImportError(advice) from error

LOG = "ppo_progress.csv"
PARITY = 1e-4


@dataclass
class PPORecipeConfig(PPOConfig):
    """TRL's `PPOConfig` with defaults under which the reward is read at EOS, and rewards normalised if asked."""

    reward_model_path: str = field(default="", metadata={"help": "A reward model's folder or hub id."})
    stop_token: str | None = field(default="eos", metadata={"help": "A reply ends there; the reward is read at it."})
    missing_eos_penalty: float | None = field(
        default=1.0, metadata={"help": "Subtracted from the score of a reply that was cut off before EOS."}
    )
    normalise_rewards: bool = field(
        default=False,
        metadata={"help": "Shift and scale scores by mean and spread in its test_metrics.json or evaluation.json."},
    )
    num_sample_generations: int = field(default=0, metadata={"help": "TRL's own samples; see `sample_prompts`."})
    save_strategy: str = field(default="no", metadata={"help": "The policy is saved at the end; PPO cannot resume."})

    def __post_init__(self) -> None:
        if self.num_sample_generations:
            raise UserError("num_sample_generations would have no effect: set sample_prompts instead")
        fit_to_device(self)
        with renamed_fields_unwarned():
            super().__post_init__()


class NormalisedScore(nn.Module):
    """A score head whose scores have mean 0 and spread 1 where the original's had `mean` and `std`."""

    def __init__(self, head: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.head, self.mean, self.std = head, mean, std

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden size) to (..., 1)."""
        return (self.head(hidden) - self.mean) / self.std


class PromptCollator(DataCollatorWithPadding):
    """Pads prompts on the left and remembers each batch's width, by which replies are told from prompts."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Token ids and mask (n, longest prompt)."""
        batch = super().__call__(features)
        self.widths = getattr(self, "widths", deque())
        self.widths.append(batch["input_ids"].shape[1])
        return batch


class MeasuredPPOTrainer(PPOTrainer):
    """TRL's trainer that also logs `response_length` (tokens, EOS included) and `missing_eos` (share of replies)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scored: list[tuple[torch.Tensor, torch.Tensor]] = []

    def train(self) -> None:
        """Train, listening to what the reward model is asked."""
        backbone = getattr(self.reward_model, self.reward_model.base_model_prefix)
        listener = backbone.register_forward_pre_hook(self._measure, with_kwargs=True)
        try:
            super().train()
        finally:
            listener.remove()

    def _measure(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        real = kwargs["attention_mask"].bool()
        self._scored.append((real, real & (kwargs["input_ids"] == self.processing_class.eos_token_id)))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what was measured since the last log, over all processes."""
        if self._scored:
            width = self.data_collator.widths.popleft()
            lengths = torch.cat([real[:, width:].sum(1) for real, _ in self._scored]).float()
            unended = torch.cat([~eos[:, width:].any(1) for _, eos in self._scored]).float()
            self._scored.clear()
            means = self.accelerator.gather(torch.stack([lengths.mean(), unended.mean()])[None]).mean(0)
            logs |= {"response_length": means[0].item(), "missing_eos": means[1].item()}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy alone, which TRL does not find under DDP, and no pickle of arguments that may hold tokens."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.accelerator.unwrap_model(self.model).policy.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)  # peft's draft, which names local paths

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No draft card."""


def check_vocabulary(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> None:
    """Hold the two tokenizers to the same tokens: PPO hands the policy's token ids to the reward model as they are.

    Raises:
        UserError: a token or the EOS token differs.
    """
    known = reward.get_vocab()
    differing = sorted(token for token, number in policy.get_vocab().items() if known.get(token) != number)
    if differing or policy.eos_token_id != reward.eos_token_id:
        what = f"token {differing[0]!r}" if differing else f"EOS {policy.eos_token!r} against {reward.eos_token!r}"
        raise UserError(
            f"expected a policy and a reward model with the same tokenizer, found that they differ in {what}; use a "
            "policy of the reward model's family, or reward_recipes.rloo, which goes by text"
        )


def check_parity(scorer: Scorer, prompt_ids: Sequence[Sequence[int]], reply_length: int) -> None:
    """Score a few replies, of at most `reply_length` tokens, as PPO does, padded on both sides, and alone.

    Raises:
        UserError: the scores differ by more than 1e-4 of the largest.
    """
    if not hasattr(scorer.model, "score"):
        raise UserError(f"{type(scorer.model).__name__}: expected a model that scores every token, as TRL's PPO needs")
    pad = scorer.tokenizer.pad_token_id
    replies = encode_texts(scorer.tokenizer, [" Yes.", " I do not know what you mean.", " No, never."])
    texts = [(list(prompt), reply[:reply_length]) for prompt in prompt_ids for reply in replies]
    left, right = max(len(prompt) for prompt, _ in texts), max(len(reply) for _, reply in texts)
    rows = [[pad] * (left - len(p)) + p + r + [pad] * (right - len(r)) for p, r in texts]
    with torch.no_grad():
        ids = torch.tensor(rows, device=scorer.model.device)
        in_ppo = get_reward(scorer.model, ids, pad, left)[1].float().cpu()
    alone = torch.tensor([scores[0] for scores in scorer.score_ids([[p + r] for p, r in texts])])
    difference, largest = (in_ppo - alone).abs().max().item(), max(1.0, alone.abs().max().item())
    if not difference <= PARITY * largest:
        raise UserError(
            f"{type(scorer.model).__name__}: expected PPO to read the scores of training, found them {difference:.2g} "
            "apart (get_reward of TRL does not fit this model); use reward_recipes.rloo"
        )


def check_rendering(scorer: Scorer, prompts: Dataset) -> None:
    """Hold a dialogue's prompt and reply to the tokens that training gave the whole dialogue.

    Raises:
        UserError: the template writes something between them that a policy is not given.
    """
    reply = "Yes."
    reply_ids = scorer.tokenizer(reply, add_special_tokens=False)["input_ids"]
    for prompt, ids in zip(prompts["prompt"], prompts["input_ids"], strict=True):
        if isinstance(prompt, list):
            (whole,) = encode_dialogues(scorer.tokenizer, [[*prompt, {"role": "assistant", "content": reply}]])
            if whole != [*ids, *reply_ids, scorer.tokenizer.eos_token_id]:
                raise UserError(
                    "expected a chat template that opens a reply as it writes one, found "
                    f"{scorer.tokenizer.decode(whole)!r:.200} beside a prompt {scorer.tokenizer.decode(ids)!r:.200}; "
                    "use reward_recipes.rloo, which goes by text"
                )


def check_batch(config: PPORecipeConfig, prompts: int) -> int:
    """The replies of a batch on one process.

    Raises:
        UserError: fewer prompts than a batch on all processes, for which TRL would wait for ever.
    """
    local_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    batch = local_batch * PartialState().num_processes
    if prompts < batch:
        raise UserError(
            f"expected prompts for a batch of {batch}, found {prompts}; lower per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )
    return local_batch


def score_spread(folder: str) -> tuple[float, float]:
    """Mean and standard deviation of the scores that the reward model's run or evaluation measured.

    Raises:
        UserError: neither file is there.
    """
    for name, prefix in ((output.TEST_METRICS, "test_"), (output.EVALUATION, "")):
        path = Path(folder) / name
        if path.is_file():
            found = json.loads(path.read_text())
            if found.get(f"{prefix}std_reward"):
                return found[f"{prefix}mean_reward"], found[f"{prefix}std_reward"]
    raise UserError(
        f"normalise_rewards: expected {output.TEST_METRICS} or {output.EVALUATION} with a score's mean and spread in "
        f"{folder}, found none; run reward_recipes.evaluate with --output_dir {folder}"
    )


def train(
    script: ScriptArguments, config: PPORecipeConfig, model_args: ModelConfig, policy_args: PolicyArguments
) -> None:
    """Run a recipe from its prompts to the policy, the log, the picture and the samples in `output_dir`.

    Raises:
        UserError: a mistake in recipe, data or models, before anything is trained.
    """
    if model_args.use_peft and PartialState().num_processes > 1:
        raise UserError("use_peft: expected one process for TRL's PPO, found several; use reward_recipes.rloo, or one")
    own_tokenizer = load_policy_tokenizer(model_args)
    tokenizer = load_tokenizer(config.reward_model_path)
    check_vocabulary(own_tokenizer, tokenizer)
    tokenizer.padding_side = "left"
    prompts = load_prompts(script, policy_args.dataset_data_dirs, tokenizer, policy_args.max_prompt_length)
    scorer = load_scorer(config.reward_model_path, device=str(config.device))
    policy = load_policy(model_args).to(config.device)
    limits = {"the policy's positions": max_positions(policy), "the reward model's max_length": scorer.max_length}
    check_lengths(prompts, config.response_length, limits)
    check_parity(scorer, prompts[:2]["input_ids"], config.response_length)
    check_rendering(scorer, prompts.select(range(min(2, len(prompts)))))
    policy.generation_config.pad_token_id = tokenizer.eos_token_id  # the reward model's pad may be beyond its tokens
    # Rollouts in several parts would be padded with that token, which the policy cannot look up.
    local_batch = check_batch(config, len(prompts))
    config.local_rollout_forward_batch_size = max(config.local_rollout_forward_batch_size, local_batch)
    reward = RewardFunction(scorer, config.missing_eos_penalty or 0.0)
    sampling = (config.temperature, config.response_length, config.seed)
    samples = Samples(prompts, policy_args.sample_prompts, own_tokenizer, reward, *sampling)
    samples.take(policy, "before")
    set_seed(config.seed)  # TRL shuffles mini-batches with numpy, which it does not seed
    trainer = MeasuredPPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=scorer.model,
        value_model=load_scorer(config.reward_model_path, device=str(config.device)).model,
        train_dataset=prompts.select_columns("input_ids"),
        data_collator=PromptCollator(tokenizer),
        peft_config=peft_config(model_args, policy, "CAUSAL_LM"),
        callbacks=[PolicyLogCallback(Path(config.output_dir) / LOG)],
    )
    head = scorer.model.score
    if config.normalise_rewards:
        scorer.model.score = NormalisedScore(head, *score_spread(config.reward_model_path))
    trainer.train()
    scorer.model.score = head
    _finish(trainer, own_tokenizer, samples)


def _finish(trainer: MeasuredPPOTrainer, tokenizer: PreTrainedTokenizerBase, samples: Samples) -> None:
    folder = Path(trainer.args.output_dir)
    trainer.save_model(str(folder))
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(folder)
    samples.take(trainer.accelerator.unwrap_model(trainer.model).policy, "after")
    if trainer.accelerator.is_main_process:
        samples.write(folder)
        print(f"policy, {LOG}, its picture and samples: {folder}")


def main() -> None:
    """Parse the recipe and train."""
    train(*parse_policy_recipe(PPORecipeConfig, LOG))
