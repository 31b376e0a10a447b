"""How a policy's replies to a few prompts are sampled, before and after training, and written with their scores."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_recipes.policy.reward_function import RewardFunction

SAMPLES = "samples.csv"


class Samples:
    """Replies to a few fixed prompts, scored, before a training and after it.

    Args:
        prompts: as from `prompts.load_prompts`; the first `count` are answered.
        count: how many.
        tokenizer: the policy's.
        reward: scores the replies.
        temperature: to sample at, as in training.
        max_new_tokens: of a reply.
        seed: of the draws, the same both times.
    """

    def __init__(
        self,
        prompts: Dataset,
        count: int,
        tokenizer: PreTrainedTokenizerBase,
        reward: RewardFunction,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        chosen = prompts.select(range(min(count, len(prompts))))
        self.prompts, self.prompt_ids = list(chosen["prompt"]), list(chosen["input_ids"])
        self.tokenizer, self.reward = tokenizer, reward
        self.temperature, self.max_new_tokens, self.seed = temperature, max_new_tokens, seed
        self._columns: dict[str, Sequence[str | float]] = {}

    def take(self, policy: PreTrainedModel, when: str) -> None:
        """Sample and score, for the columns `when` and `score_WHEN`; leaves the policy in evaluation mode."""
        if not self.prompts:
            return
        ids = self._replies(policy.eval())  # after training it would drop out, and might do without its cache
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        chat = isinstance(self.prompts[0], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        self._columns |= {when: texts, f"score_{when}": self.reward(self.prompts, completions, ids)}

    @torch.no_grad()
    def _replies(self, policy: PreTrainedModel) -> list[list[int]]:
        """Token ids of one reply to each prompt, up to and with EOS."""
        eos = self.tokenizer.eos_token_id
        prompts = [torch.tensor(ids, device=policy.device) for ids in self.prompt_ids]
        masks = [torch.ones_like(ids) for ids in prompts]
        # Padded with EOS, which every policy can look up; some tokenizers' pad token has no embedding.
        padded = pad_sequence(prompts, batch_first=True, padding_value=eos, padding_side="left")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            replies = policy.generate(
                input_ids=padded,
                attention_mask=pad_sequence(masks, batch_first=True, padding_side="left"),
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=self.temperature,
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
        if not self.prompts:
            return
        path, table = folder / SAMPLES, pd.DataFrame({"prompt": self.prompts} | self._columns)
        table.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)  # replies may hold any line end
        before, after = table["score_before"].mean(), table["score_after"].mean()
        print(
            f"mean score of {len(table)} sampled replies: {before:+.3f} before, {after:+.3f} after; they are in {path}"
        )
