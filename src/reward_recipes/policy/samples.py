"""Replies of the policy to a few prompts, sampled before and after training, and written with their scores."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from reward_recipes.policy.reward_function import RewardFunction

# What else is measured of a reply: a number, from the prompt (text or messages) and the reply's text.
Measure = Callable[[Any, str], float]


@dataclass
class Samples:
    """Scored replies to a few fixed prompts, drawn with the `temperature` and `seed` of TRL's config, both times."""

    asked: dict[str, list[Any]]  # the prompts' columns `prompt` and `input_ids`
    tokenizer: PreTrainedTokenizerBase  # the policy's
    reward: RewardFunction
    config: TrainingArguments
    max_new_tokens: int
    measures: Mapping[str, Measure] = field(default_factory=dict)  # by the name of their column
    _drawn: dict[str, pd.DataFrame] = field(default_factory=dict, init=False)

    def take(self, policy: PreTrainedModel, when: str) -> None:
        """Sample and score; replies taken under the same `when` are replaced. `policy` may be a trainer's model."""
        model = extract_model_from_parallel(policy)
        policy = getattr(model, "policy", model)  # PPO's model holds its value model too
        was_training = policy.training
        ids = self._replies(policy.eval())  # in training it would drop out, and might do without its cache
        policy.train(was_training)
        texts, prompts = self.tokenizer.batch_decode(ids, skip_special_tokens=True), self.asked["prompt"]
        chat = isinstance(prompts[0], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        drawn = pd.DataFrame({"reply": texts, "score": self.reward(prompts, completions, ids)})
        for name, measure in self.measures.items():
            drawn[name] = [measure(*pair) for pair in zip(prompts, texts, strict=True)]
        self._drawn[when] = drawn

    def means(self, when: str) -> dict[str, float]:
        """Mean `score`, and mean of each of `measures`, of the replies taken then."""
        return self._drawn[when].drop(columns="reply").mean().to_dict()

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
        """Write `samples.csv`: `prompt`, reply `before`, `score_before`, each measure likewise, then `after`."""
        path, table = folder / "samples.csv", pd.DataFrame({"prompt": self.asked["prompt"]})
        for when in ("before", "after"):
            table = table.join(self._drawn[when].add_suffix(f"_{when}").rename(columns={f"reply_{when}": when}))
        table.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)  # replies may hold any line end
        after = self.means("after")
        for name, before in self.means("before").items():
            label = f"mean {name.replace('_', ' ')} of {len(table)} replies"
            print(f"{label}: {before:+.3f} before, {after[name]:+.3f} after")
        print(f"the replies are in {path}")
