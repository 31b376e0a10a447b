"""Train a policy with TRL's PPO against a reward model. `python -m reward_recipes.ppo`."""

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, PreTrainedTokenizerBase, set_seed

from reward_recipes.pairs import encode_texts
from reward_recipes.policy.common import (
    PolicyRecipe,
    RewardFields,
    check_lengths,
    init_options,
    load_policy_tokenizer,
    parse_policy_recipe,
    train_between_samples,
)
from reward_recipes.policy.prompts import load_prompts
from reward_recipes.policy.reward_function import RewardFunction
from reward_recipes.policy.samples import Measure, Samples
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
BY_TEXT = "use reward_recipes.rloo, which goes by text"


@dataclass
class PPORecipeConfig(RewardFields, PPOConfig):
    """TRL's `PPOConfig` with defaults under which the reward is read at EOS, and rewards normalised if asked."""

    stop_token: str | None = option("eos", "A reply ends there; the reward is read at it.")
    normalise_rewards: bool = option(False, "Scale scores by the reward model's mean and spread on its test pairs.")


class NormalisedReward(nn.Module):
    """The reward model as TRL's `get_reward` calls it, its scores normalised; `seen` is the batch that it read last."""

    base_model_prefix = "read"

    def __init__(self, scorer: Scorer, mean: float, std: float) -> None:
        super().__init__()
        self.model, self._mean, self._std = scorer.model, mean, std

    def read(self, **batch: Any) -> Any:
        """The backbone's output for prompts and replies, each up to its EOS."""
        self.seen = batch
        return self.model.base_model(**batch)

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalised scores of all positions."""
        return (self.model.score(hidden) - self._mean) / self._std


class MeasuredPPOTrainer(PPOTrainer):
    """TRL's trainer that also logs `response_length` (tokens, EOS included) and `missing_eos` (share of replies).

    Its reward model is a `NormalisedReward`. It saves `policy_tokenizer` with the policy.
    """

    def __init__(self, policy_tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> None:
        super().__init__(data_collator=self._collate, **kwargs)
        self._policy_tokenizer = policy_tokenizer
        self._widths: deque[int] = deque()  # of the batches of prompts, which are loaded ahead of their use

    def _collate(self, prompts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = DataCollatorWithPadding(self.processing_class)(prompts)
        self._widths.append(batch["input_ids"].shape[1])  # replies begin there
        return batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what is measured of an update's replies, as means over all processes."""
        batch, width = self.reward_model.seen, self._widths.popleft()
        reply = batch["attention_mask"][:, width:]
        ended = (reply & (batch["input_ids"][:, width:] == self.processing_class.eos_token_id)).any(1)
        means = torch.stack([reply.sum(1).float().mean(), (~ended).float().mean()])
        length, missing = self.accelerator.gather(means[None]).mean(0).tolist()
        super().log(logs | {"response_length": length, "missing_eos": missing}, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy alone, which TRL does not find under DDP, with its own tokenizer."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).policy.save_pretrained(folder)
            self._policy_tokenizer.save_pretrained(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no draft of a card, which fails under DDP."""


def check_tokenizers(own: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> None:
    """Let the policy's tokenizer and the reward model's differ in their pad token only.

    Raises:
        UserError: another difference, because PPO hands the policy's token ids to the reward model.
    """
    known = reward.get_vocab()
    differing = sorted(token for token, number in own.get_vocab().items() if known.get(token) != number)
    if differing or own.eos_token_id != reward.eos_token_id:
        what = f"token {differing[0]!r}" if differing else f"EOS {own.eos_token!r}"
        raise UserError(f"expected a policy with the reward model's tokenizer, found another {what}; {BY_TEXT}")


def check_parity(scorer: Scorer, prompts: dict[str, list[Any]]) -> None:
    """Score a few replies as PPO does, padded on both sides, and alone, as training did: dialogues by the template.

    Args:
        prompts: columns `prompt` and `input_ids`.

    Raises:
        UserError: the scores differ by more than 1e-4 of the largest, or of 1.
    """
    tokenizer, pad = scorer.tokenizer, scorer.tokenizer.pad_token_id
    texts, whole = [], []
    asked = zip(prompts["prompt"], prompts["input_ids"], strict=True)
    for (prompt, ids), reply in product(asked, ("Yes.", "I do not know.")):
        reply_ids = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        texts.append((torch.tensor(ids), torch.tensor(reply_ids)))
        dialogue = isinstance(prompt, list) and [*prompt, {"role": "assistant", "content": reply}]
        whole += encode_texts(tokenizer, [dialogue], scorer.as_is) if dialogue else [[*ids, *reply_ids]]
    left = pad_sequence([ids for ids, _ in texts], True, padding_value=pad, padding_side="left")
    right = pad_sequence([ids for _, ids in texts], True, padding_value=pad)
    with torch.no_grad():
        ids = torch.cat([left, right], dim=1).to(scorer.model.device)
        in_ppo = get_reward(scorer.model, ids, pad, left.shape[1])[1].float().cpu()
    alone = torch.tensor([scores[0] for scores in scorer.score_ids([[ids] for ids in whole])])
    difference, largest = (in_ppo - alone).abs().max().item(), max(1.0, alone.abs().max().item())
    if not difference <= PARITY * largest:  # nan too
        reason = "the model heeds padding, or its chat template opens no reply as it writes one"
        found = f"found them {difference:.2g} apart: {reason}; {BY_TEXT}"
        raise UserError(f"expected PPO to read the scores of training, {found}")


def fit_batch(config: PPORecipeConfig, prompts: int) -> None:
    """Let TRL sample a batch in one part; raise `UserError` for fewer prompts than a batch, on which TRL hangs."""
    local_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    batch = local_batch * PartialState().num_processes
    if prompts < batch:
        raise UserError(f"expected prompts for a batch of {batch}, found {prompts}; lower per_device_train_batch_size")
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
        f"normalise_rewards: expected {output.TEST_METRICS} or {output.EVALUATION} in {folder}, found none; run "
        f"reward_recipes.evaluate with --output_dir {folder}"
    )


def train(recipe: PolicyRecipe, measures: Mapping[str, Measure] | None = None) -> None:
    """Run a recipe, from its prompts to what stands in `output_dir`; raises `UserError` before anything is trained.

    `measures` are what `samples.csv` and the log say of sampled replies beside the score, by their columns' names.
    """
    script, config, model_args, policy_args = recipe
    if model_args.use_peft and PartialState().num_processes > 1:
        raise UserError("use_peft: expected one process for TRL's PPO, found several; use reward_recipes.rloo, or one")
    own_tokenizer = load_policy_tokenizer(model_args)
    scorer = load_scorer(config.reward_model_path, device=str(config.device))
    tokenizer = scorer.tokenizer
    check_tokenizers(own_tokenizer, tokenizer)
    tokenizer.padding_side = "left"
    prompts, asked = load_prompts(script, policy_args, tokenizer)
    fit_batch(config, len(prompts))
    policy = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **init_options(model_args))
    limits = {"the policy's positions": max_positions(policy), "the reward model's max_length": scorer.max_length}
    check_lengths([prompts, asked], config.response_length, limits)
    check_parity(scorer, prompts[:2])
    spread = score_spread(config.reward_model_path) if config.normalise_rewards else (0.0, 1.0)
    policy.generation_config.pad_token_id = tokenizer.eos_token_id  # the reward model's pad may be beyond its tokens
    reward = RewardFunction(scorer, config.missing_eos_penalty or 0.0)
    samples = Samples(asked[:], own_tokenizer, reward, config, config.response_length, measures or {})
    set_seed(config.seed)  # TRL shuffles mini-batches with numpy, which it does not seed
    trainer = MeasuredPPOTrainer(
        policy_tokenizer=own_tokenizer,
        args=config,
        processing_class=tokenizer,
        model=policy.to(config.device),
        ref_model=None,
        reward_model=NormalisedReward(scorer, *spread),
        value_model=load_scorer(config.reward_model_path, device=str(config.device)).model,
        train_dataset=prompts.select_columns("input_ids"),
        peft_config=peft_config(model_args, "CAUSAL_LM"),
    )
    train_between_samples(trainer, samples, LOG, policy_args.sample_steps)


def main() -> None:
    """Parse the recipe and train."""
    train(parse_policy_recipe(PPORecipeConfig, LOG))
