"""How tokenised pairs become a batch: padded as in TRL, or packed; both carry what the exact figures need."""

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from reward_recipes.packing.layout import Group, group_of, pack_texts


def bookkeeping(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the figures must know of n pairs besides their tokens.

    Returns:
        `row` and `subset` (n,); `tokens` (3,): tokens of both texts, of both texts with each common prefix once, and of
        the batch padded to its longest text.
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
    """n pairs to packed rows.

    Args:
        pad_token_id: fills the rows' ends.
        max_tokens_per_row: most tokens of a row; where a pair is longer, its length.
        share_prompts: compute each common prefix once; else each text has its own stretch, and masks of its own where
            dropout is on.
    """

    pad_token_id: int
    max_tokens_per_row: int
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
