"""How tokenised pairs become batches: of training, padded as in TRL or packed; of evaluation, by length."""

from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from trl.trainer.reward_trainer import DataCollatorForPreference

from reward_recipes.packing.layout import Group, by_length, group_of, pack_texts, pad_texts

CELLS_ON_CPU, CELLS_ELSEWHERE = 2048, 65536  # tokens of an evaluation batch, padding included
FEWEST_BATCHES = 64  # of an evaluation: lengths differ more within larger batches, which are then padded more


def bookkeeping(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the figures must know of n pairs: `row` and `subset` (n,), and `tokens` (3,).

    These count tokens of both texts, of both with each common prefix once, and of the batch padded to its longest text.
    """
    lengths = [len(example[side]) for example in examples for side in ("chosen_ids", "rejected_ids")]
    unique = sum(group_of(example).length for example in examples)
    return {
        "row": torch.tensor([example["row"] for example in examples]),
        "subset": torch.tensor([example["subset"] for example in examples]),
        "tokens": torch.tensor([sum(lengths), unique, max(lengths) * len(lengths)]),
    }


class PaddedCollator(DataCollatorForPreference):
    """TRL's collator: n pairs to `input_ids` and `attention_mask` (2n, longest text), chosen texts first."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A padded batch with its `bookkeeping`."""
        return super().torch_call(examples) | bookkeeping(examples)


@dataclass
class PackedCollator:
    """n pairs to packed rows of at most `max_tokens_per_row` tokens; where a pair is longer, of its length.

    Unless prompts are shared, each text has its own stretch, and with dropout its own dropout masks.
    """

    pad_token_id: int
    max_tokens_per_row: float
    share_prompts: bool = True

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """As `pack_texts`, with `bookkeeping` and, where the pairs have one, their `margin` (n,).

        `score_index` (2n,) is in TRL's order: the chosen texts of all pairs, then the rejected ones.
        """
        groups = [group_of(example) for example in examples]
        if not self.share_prompts:
            groups = [Group(0, [text]) for group in groups for text in group.texts]
        batch = pack_texts(groups, self.max_tokens_per_row, self.pad_token_id)
        batch["score_index"] = batch["score_index"].view(-1, 2).T.flatten()
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([example["margin"] for example in examples], dtype=torch.float)
        return batch | bookkeeping(examples)


def training_collator(
    layout: str, pad_token_id: int, max_tokens_per_row: float | None
) -> PaddedCollator | PackedCollator:
    """The collator for a layout of `choose_packing`."""
    if layout == "padded":
        return PaddedCollator(pad_token_id=pad_token_id)
    return PackedCollator(pad_token_id, max_tokens_per_row, share_prompts=layout == "shared")


class EvalBatches(torch.utils.data.Dataset):
    """Tokenised pairs in batches of like length, the longest first; an item is a batch that a model can read.

    Batches are small on a CPU, whose caches they fit, and large elsewhere, with at most `most` pairs. Processes that
    share them compute equally many. Without `max_tokens_per_row` each text is padded.
    """

    collate = itemgetter(0)  # of a loader whose batch size is 1

    def __init__(
        self, pairs: Dataset, pad_token_id: int, device: torch.device, most: int, max_tokens_per_row: float | None
    ) -> None:
        self.pairs, self.pad_token_id, self.max_tokens_per_row = pairs, pad_token_id, max_tokens_per_row
        self._texts = pairs.select_columns(["prefix", "chosen_ids", "rejected_ids"])
        table = self._texts.with_format("arrow")[:]
        chosen, rejected = (pc.list_value_length(table[name]).to_numpy() for name in ("chosen_ids", "rejected_ids"))
        shared = chosen + rejected - table["prefix"].to_numpy()
        lengths = 2 * np.maximum(chosen, rejected) if max_tokens_per_row is None else shared
        suits = CELLS_ON_CPU if device.type == "cpu" else CELLS_ELSEWHERE
        cells = min(suits, max(CELLS_ON_CPU, lengths.sum() // FEWEST_BATCHES))
        self.batches = by_length(lengths, cells, most)

    def __len__(self) -> int:
        """Batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """As `pack_texts` or `pad_texts`, each pair's chosen text before its rejected one."""
        groups = [group_of(example) for example in self._texts.__getitems__(self.batches[index])]
        if self.max_tokens_per_row is not None:
            return pack_texts(groups, self.max_tokens_per_row, self.pad_token_id)
        return pad_texts([text for group in groups for text in group.texts], self.pad_token_id)

    def in_order(self, scores: np.ndarray) -> np.ndarray:
        """(batches, most pairs of one, 2) scores, filled up at a batch's end, to (pairs, 2) in the data's order."""
        ordered = np.empty((len(self.pairs), 2), scores.dtype)
        for places, found in zip(self.batches, scores, strict=True):
            ordered[places] = found[: len(places)]
        return ordered
