"""How pairs share rows: each prompt computed once, no padding to the longest text, scores as if computed alone.

A pair is laid out as `[common prefix | chosen tail | rejected tail]`. Both tails continue the prefix's positions, and a
token sees the tokens before it in its own text only: the prefix and its own tail. Several pairs share a row. For a
model with full causal attention every score then equals the one computed from the text alone.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

PREFIX, CHOSEN, REJECTED = 0, 1, 2
NO_PAIR = -1

Group = tuple[int, Sequence[Sequence[int]]]

WIDTHS_TRIED = 32
# Row length at which attention costs as much as a layer's weights do: 6 times the hidden size, here a small model's.
ATTENTION_PAR = 2048


def packed_length(example: Mapping[str, Any]) -> int:
    """Tokens that a pair takes in a row: both texts, the common prefix once."""
    return len(example["chosen_ids"]) + len(example["rejected_ids"]) - example["prefix"]


def group_length(group: Group) -> int:
    """Tokens that a group of texts takes in a row: all texts, the common prefix once."""
    prefix, texts = group
    return prefix + sum(len(text) - prefix for text in texts)


def assign_rows(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Distribute pairs over rows, first fit decreasing, at the row length that is cheapest to compute.

    All rows of a batch get as wide as the fullest one. Long rows leave little padding, short ones little attention to
    compute, so several lengths are tried, from the longest pair's up to `limit`.

    Args:
        lengths: tokens of each pair.
        limit: most tokens of a row; where a pair is longer, its length.

    Returns:
        Rows, each a list of indices into `lengths`.
    """
    longest = max(lengths)
    room = max(limit - longest, 0)
    widths = {longest + room * part // WIDTHS_TRIED for part in range(WIDTHS_TRIED + 1)}
    return min((_first_fit_decreasing(lengths, width) for width in sorted(widths)), key=partial(_cost, lengths))


def _cost(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    """Work of a layer, up to a factor: linear in the cells for its weights, and in cells times width for attention."""
    width = max(sum(lengths[pair] for pair in row) for row in rows)
    return len(rows) * width * (ATTENTION_PAR + width)


def _first_fit_decreasing(lengths: Sequence[int], width: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for pair in sorted(range(len(lengths)), key=lambda pair: -lengths[pair]):
        row = next((row for row, left in enumerate(room) if left >= lengths[pair]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(pair)
        room[row] -= lengths[pair]
    return rows


def pack_pairs(examples: Sequence[Mapping[str, Any]], limit: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Lay n tokenised pairs out in rows, the chosen text as side 1 and the rejected one as side 2.

    Args:
        examples: pairs with `chosen_ids`, `rejected_ids` and `prefix` (tokens common to both, less than either).
        limit: most tokens of a row; where a pair is longer, its length.
        pad_token_id: fills the rows' ends.

    Returns:
        As `pack_texts`, with `score_index` (2n,) in TRL's order: the chosen texts of all pairs, then the rejected ones.
    """
    groups = [(example["prefix"], [example["chosen_ids"], example["rejected_ids"]]) for example in examples]
    packed = pack_texts(groups, limit, pad_token_id)
    return packed | {"score_index": packed["score_index"].view(-1, 2).T.flatten()}


def pack_texts(groups: Sequence[Group], limit: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Lay groups of texts out in R rows of width W, the tokens that a group's texts begin with once.

    Args:
        groups: for each, the number of tokens common to its texts (less than any of them holds) and their token ids.
        limit: most tokens of a row; where a group is longer, its length.
        pad_token_id: fills the rows' ends.

    Returns:
        `input_ids` and `position_ids` (R, W); `attention_mask` (R, W), 1 on tokens and 0 on padding; `pair` (R, W), the
        group's index or `NO_PAIR`; `side` (R, W), `PREFIX` or 1, 2, ... for the group's texts; `score_index` (texts,),
        where the last token of each text stands in the flattened rows, group after group.
    """
    lengths = [group_length(group) for group in groups]
    rows = assign_rows(lengths, limit)
    shape = (len(rows), max(sum(lengths[group] for group in row) for row in rows))
    input_ids, positions = np.full(shape, pad_token_id), np.zeros(shape, dtype=np.int64)
    owners, sides = np.full(shape, NO_PAIR), np.full(shape, PREFIX)
    score_index: list[list[int]] = [[] for _ in groups]
    for row, members in enumerate(rows):
        end = 0
        for group in members:
            prefix, texts = groups[group]
            for side, text in enumerate(texts, start=1):
                shared = prefix if side > 1 else 0
                start, end = end, end + len(text) - shared
                input_ids[row, start:end], positions[row, start:end] = text[shared:], range(shared, len(text))
                owners[row, start:end] = group
                sides[row, start + prefix - shared : end] = side
                score_index[group].append(row * shape[1] + end - 1)
    arrays = {"input_ids": input_ids, "position_ids": positions, "pair": owners, "side": sides}
    packed = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return packed | {
        "attention_mask": (packed["pair"] != NO_PAIR).long(),
        "score_index": torch.tensor([place for places in score_index for place in places]),
    }


def packed_attention_mask(pair: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """Which token may see which: (R, W) `pair` and `side` of `pack_pairs` to a boolean (R, 1, query W, key W) mask.

    A query sees the keys before it, of its own pair, that stand in the prefix or on its own side. Padding sees padding,
    because a query without any key would turn into NaN.
    """
    same_pair = pair[:, :, None] == pair[:, None, :]
    own_text = (side[:, None, :] == PREFIX) | (side[:, None, :] == side[:, :, None])
    return (same_pair & own_text).tril().unsqueeze(1)


class ScoreTap:
    """Makes a model whose own output holds one pooled score a row return the score of every token.

    It takes them from the `score` module and hands them out as the model's output, so that the model is still called
    as a whole, and its wrappers (DDP, FSDP, DeepSpeed, PEFT) see the very tensor that the loss is computed from. A call
    that does not come through `forward` is left alone.

    Args:
        model: as it will be wrapped, an adapter included.
    """

    def __init__(self, model: nn.Module) -> None:
        self._listening = False
        self._scores: torch.Tensor | None = None
        head = next(module for name, module in model.named_modules() if name.split(".")[-1] == "score")
        self._handles = (head.register_forward_hook(self._keep), model.register_forward_hook(self._hand_out))

    @contextmanager
    def reading(self, batch):
        self._index = batch["score_index"]
        mask = packed_attention_mask(batch["pair"], batch["side"])
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
        if "margin" in batch:
            inputs["margin"] = batch["margin"]
        self._listening = True
        try:
            yield inputs | {"use_cache": False}
        finally:
            self._listening, self._scores = False, None

    def forward(self, model, **packed):
        with self.reading(packed) as inputs:
            return model(**inputs)

    def _keep(self, head: nn.Module, args: tuple[Any, ...], scores: torch.Tensor) -> None:
        if self._listening:
            self._scores = scores

    def _hand_out(self, model: nn.Module, args: tuple[Any, ...], output: object) -> SequenceClassifierOutput | None:
        return SequenceClassifierOutput(logits=self._scores.flatten(0, 1)[self._index]) if self._listening else None

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
