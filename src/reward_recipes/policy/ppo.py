"""Train a policy with TRL's PPO against a reward model. `python -m reward_recipes.ppo`."""

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
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, ScriptArguments

from reward_recipes.pairs import encode_dialogues, encode_texts, load_tokenizer
from reward_recipes.policy.common import (
    PolicyArguments,
    RewardFields,
    check_lengths,
    load_policy,
    load_policy_tokenizer,
    parse_policy_recipe,
    train_between_samples,
)
from reward_recipes.policy.log import PolicyLogCallback
from reward_recipes.policy.prompts import load_prompts
from reward_recipes.policy.reward_function import RewardFunction
from reward_recipes.policy.samples import Samples
from reward_recipes.run import UserError, option, output, read_mapping
from reward_recipes.score import Scorer, load_scorer, max_positions, peft_config

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns that newer versions differ: the reason for the extra
try:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.utils import get_reward
except ImportError as error:
    advice = "PPO needs TRL 1.12, the last release that has it: pip install 'reward-recipes[ppo]'"
    raise ImportError(advice) from error

LOG = "ppo_progress.csv"
PARITY = 1e-4  # of the largest score


@dataclass
class PPORecipeConfig(RewardFields, PPOConfig):
    """TRL's `PPOConfig` with defaults under which the reward is read at EOS, and rewards normalised if asked."""

    stop_token: str | None = option("eos", "A reply ends there; the reward is read at it.")
    normalise_rewards: bool = option(False, "Scale scores by the mean and spread that its run or evaluation wrote.")
    num_sample_generations: int = option(0, "TRL's own samples; see `sample_prompts`.")

    def __post_init__(self) -> None:
        if self.num_sample_generations:
            raise UserError("num_sample_generations would have no effect: set sample_prompts instead")
        super().__post_init__()


class NormalisedScore(nn.Module):
    """A score head whose scores have mean 0 and spread 1 where the original's had `mean` and `std`."""

    def __init__(self, head: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.head, self.mean, self.std = head, mean, std

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden size) to (..., 1)."""
        return (self.head(hidden) - self.mean) / self.std


@dataclass
class PromptCollator(DataCollatorWithPadding):
    """Pads prompts and queues each batch's width, after which replies begin; batches are loaded ahead of their use."""

    widths: deque[int] = field(default_factory=deque)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Token ids and mask (n, longest prompt)."""
        batch = super().__call__(features)
        self.widths.append(batch["input_ids"].shape[1])
        return batch


class MeasuredPPOTrainer(PPOTrainer):
    """TRL's trainer that also logs `response_length` (tokens, EOS included) and `missing_eos` (share of replies).

    Args:
        policy_tokenizer: saved with the policy.
        spread: mean and standard deviation by which scores are normalised; None leaves them as they are.
    """

    def __init__(
        self, policy_tokenizer: PreTrainedTokenizerBase, spread: tuple[float, float] | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._policy_tokenizer, self._spread = policy_tokenizer, spread
        self._measured = torch.zeros(2)

    def train(self) -> None:
        """Train, and measure what the reward model is given: the replies, each up to its EOS."""
        head = self.reward_model.score
        if self._spread:
            self.reward_model.score = NormalisedScore(head, *self._spread)
        backbone = getattr(self.reward_model, self.reward_model.base_model_prefix)
        hook = backbone.register_forward_pre_hook(self._measure, with_kwargs=True)
        try:
            super().train()
        finally:
            hook.remove()
            self.reward_model.score = head

    def _measure(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        width = self.data_collator.widths.popleft()
        reply = kwargs["attention_mask"][:, width:].bool()
        ended = (reply & (kwargs["input_ids"][:, width:] == self.processing_class.eos_token_id)).any(1)
        self._measured = torch.stack([reply.sum(1).float().mean(), (~ended).float().mean()])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the measured means over all processes."""
        length, missing = self.accelerator.gather(self._measured[None]).mean(0).tolist()
        super().log(logs | {"response_length": length, "missing_eos": missing}, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy alone, which TRL does not find under DDP, with its own tokenizer."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).policy.save_pretrained(folder)
            self._policy_tokenizer.save_pretrained(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no draft of a card, which fails under DDP."""


def load_tokenizers(model_args: ModelConfig, path: str) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The policy's own tokenizer and that of the reward model at `path`, which may differ in their pad token only.

    Raises:
        UserError: another difference, because PPO hands the policy's token ids to the reward model.
    """
    own, reward = load_policy_tokenizer(model_args), load_tokenizer(path)
    known = reward.get_vocab()
    differing = sorted(token for token, number in own.get_vocab().items() if known.get(token) != number)
    if differing or own.eos_token_id != reward.eos_token_id:
        what = f"token {differing[0]!r}" if differing else f"EOS {own.eos_token!r} against {reward.eos_token!r}"
        raise UserError(
            f"expected a policy and a reward model with the same tokenizer, found that they differ in {what}; use a "
            "policy of the reward model's family, or reward_recipes.rloo, which goes by text"
        )
    reward.padding_side = "left"
    return own, reward


def check_parity(scorer: Scorer, prompt_ids: Sequence[Sequence[int]], reply_length: int) -> None:
    """Score a few replies, of at most `reply_length` tokens, as PPO does, padded on both sides, and alone.

    Raises:
        UserError: the scores differ by more than 1e-4 of the largest.
    """
    name, pad = type(scorer.model).__name__, scorer.tokenizer.pad_token_id
    if not hasattr(scorer.model, "score"):
        raise UserError(f"{name}: expected a model that scores every token, as TRL's PPO needs")
    replies = encode_texts(scorer.tokenizer, [" Yes.", " I do not know what you mean.", " No, never."])
    texts = [(list(prompt), reply[:reply_length]) for prompt in prompt_ids for reply in replies]
    left = pad_sequence([torch.tensor(p) for p, _ in texts], True, padding_value=pad, padding_side="left")
    right = pad_sequence([torch.tensor(r) for _, r in texts], True, padding_value=pad)
    with torch.no_grad():
        ids = torch.cat([left, right], dim=1).to(scorer.model.device)
        in_ppo = get_reward(scorer.model, ids, pad, left.shape[1])[1].float().cpu()
    alone = torch.tensor([scores[0] for scores in scorer.score_ids([[p + r] for p, r in texts])])
    difference, largest = (in_ppo - alone).abs().max().item(), max(1.0, alone.abs().max().item())
    if not difference <= PARITY * largest:  # nan too
        raise UserError(
            f"{name}: expected PPO to read the scores of training, found them {difference:.2g} apart (get_reward of "
            "TRL does not fit this model); use reward_recipes.rloo"
        )


def check_rendering(tokenizer: PreTrainedTokenizerBase, prompts: dict[str, list[Any]]) -> None:
    """Require of a dialogue's prompt and reply the tokens that training gave the whole dialogue.

    Raises:
        UserError: the template writes something between them that a policy is not given.
    """
    reply = "Yes."
    reply_ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
    for prompt, ids in zip(prompts["prompt"], prompts["input_ids"], strict=True):
        if isinstance(prompt, str):
            continue
        (whole,) = encode_dialogues(tokenizer, [[*prompt, {"role": "assistant", "content": reply}]])
        if whole != [*ids, *reply_ids, tokenizer.eos_token_id]:
            raise UserError(
                f"expected a chat template that opens a reply as it writes one, found {tokenizer.decode(whole)!r:.200} "
                f"beside a prompt {tokenizer.decode(ids)!r:.200}; use reward_recipes.rloo, which goes by text"
            )


def check_fit(policy: PreTrainedModel, scorer: Scorer, prompts: Dataset, reply_length: int) -> None:
    """Require that policy and reward model can read prompts and replies; raise `UserError` otherwise."""
    limits = {"the policy's positions": max_positions(policy), "the reward model's max_length": scorer.max_length}
    check_lengths(prompts, reply_length, limits)
    check_parity(scorer, prompts[:2]["input_ids"], reply_length)
    check_rendering(scorer.tokenizer, prompts[:2])


def fit_batch(config: PPORecipeConfig, prompts: int) -> None:
    """Let TRL sample a batch in one part; raise `UserError` for fewer prompts than a batch, on which TRL hangs."""
    local_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    batch = local_batch * PartialState().num_processes
    if prompts < batch:
        raise UserError(
            f"expected prompts for a batch of {batch}, found {prompts}; lower per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )
    # TRL joins parts with the reward model's pad token, for which the policy may have no embedding.
    config.local_rollout_forward_batch_size = max(config.local_rollout_forward_batch_size, local_batch)


def score_spread(folder: str) -> tuple[float, float]:
    """Mean and standard deviation of the scores that the reward model's run or evaluation wrote into its folder.

    Raises:
        UserError: neither did.
    """
    for name, prefix in ((output.TEST_METRICS, "test_"), (output.EVALUATION, "")):
        path = Path(folder) / name
        found = read_mapping(path) if path.is_file() else {}
        if found.get(f"{prefix}std_reward"):
            return found[f"{prefix}mean_reward"], found[f"{prefix}std_reward"]
    raise UserError(
        f"normalise_rewards: expected {output.TEST_METRICS} or {output.EVALUATION} with a score's mean and spread in "
        f"{folder}, found none; run reward_recipes.evaluate with --output_dir {folder}"
    )


def train(
    script: ScriptArguments, config: PPORecipeConfig, model_args: ModelConfig, policy_args: PolicyArguments
) -> None:
    """Run a recipe: from its prompts to the policy, the log, the picture and the samples in `output_dir`.

    Raises:
        UserError: a mistake in recipe, data or models, before anything is trained.
    """
    if model_args.use_peft and PartialState().num_processes > 1:
        raise UserError("use_peft: expected one process for TRL's PPO, found several; use reward_recipes.rloo, or one")
    own_tokenizer, tokenizer = load_tokenizers(model_args, config.reward_model_path)
    prompts = load_prompts(script, policy_args.dataset_data_dirs, tokenizer, policy_args.max_prompt_length)
    fit_batch(config, len(prompts))
    scorer = load_scorer(config.reward_model_path, device=str(config.device))
    policy = load_policy(model_args).to(config.device)
    check_fit(policy, scorer, prompts, config.response_length)
    policy.generation_config.pad_token_id = tokenizer.eos_token_id  # the reward model's pad may be beyond its tokens
    set_seed(config.seed)  # TRL shuffles mini-batches with numpy, which it does not seed
    trainer = MeasuredPPOTrainer(
        policy_tokenizer=own_tokenizer,
        spread=score_spread(config.reward_model_path) if config.normalise_rewards else None,
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=scorer.model,
        value_model=load_scorer(config.reward_model_path, device=str(config.device)).model,
        train_dataset=prompts.select_columns("input_ids"),
        data_collator=PromptCollator(tokenizer),
        peft_config=peft_config(model_args, "CAUSAL_LM"),
        callbacks=[PolicyLogCallback(Path(config.output_dir) / LOG)],
    )
    reward = RewardFunction(scorer, config.missing_eos_penalty or 0.0)
    asked = prompts[: policy_args.sample_prompts]
    samples = Samples(asked, own_tokenizer, reward, config.temperature, config.response_length, config.seed)
    train_between_samples(trainer, trainer.accelerator.unwrap_model(trainer.model).policy, samples, LOG)


def main() -> None:
    """Parse the recipe and train."""
    train(*parse_policy_recipe(PPORecipeConfig, LOG))
