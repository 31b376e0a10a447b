"""Replies of the policy to a few prompts, sampled before and after training, and written with their scores."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from reward_recipes.policy.reward_function import RewardFunction


@dataclass
class Samples:
    """Scored replies to a few fixed prompts, drawn with the `temperature` and `seed` of TRL's config, both times."""

    asked: dict[str, list[Any]]  # the prompts' columns `prompt` and `input_ids`
    tokenizer: PreTrainedTokenizerBase  # the policy's
    reward: RewardFunction
    config: TrainingArguments
    max_new_tokens: int

    def __post_init__(self) -> None:
        self.table = pd.DataFrame({"prompt": self.asked["prompt"]})

    def take(self, policy: PreTrainedModel, when: str) -> None:
        """Sample and score, for the columns `when` and `score_WHEN`; leaves the policy in evaluation mode."""
        ids = self._replies(policy.eval())  # after training it would drop out, and might do without its cache
        texts, prompts = self.tokenizer.batch_decode(ids, skip_special_tokens=True), self.asked["prompt"]
        chat = isinstance(prompts[0], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        self.table[when] = texts
        self.table[f"score_{when}"] = self.reward(prompts, completions, ids)

    @torch.no_grad()
    def _replies(self, policy: PreTrainedModel) -> list[list[int]]:
        """Token ids of one reply to each prompt, up to and with EOS."""
        eos = self.tokenizer.eos_token_id
        prompts = [torch.tensor(ids, device=policy.device) for ids in self.asked["input_ids"]]
        masks = [torch.ones_like(ids) for ids in prompts]
        # Padded with EOS, which every policy can look up; some tokenizers' pad token has no embedding.
        padded = pad_sequence(prompts, batch_first=True, padding_value=eos, padding_side="left")
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            replies = policy.generate(
                input_ids=padded,
                attention_mask=pad_sequence(masks, batch_first=True, padding_side="left"),
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=self.config.temperature,
                # As TRL's trainers sample by default, whatever the policy's own generation_config prefers.
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                eos_token_id=eos,
                pad_token_id=eos,
            )[:, padded.shape[1] :].tolist()
        return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in replies]

    def write(self, folder: Path) -> None:
        """Write `samples.csv`: prompts, `before`, `score_before`, `after`, `score_after`; print the mean scores."""
        path = folder / "samples.csv"
        self.table.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)  # replies may hold any line end
        before, after = self.table["score_before"].mean(), self.table["score_after"].mean()
        print(f"mean score of {len(self.table)} replies: {before:+.3f} before, {after:+.3f} after; they are in {path}")
