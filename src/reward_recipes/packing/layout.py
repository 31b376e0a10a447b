"""How pairs share rows: each prompt computed once, no padding to the longest text, scores as if computed alone.

A pair is laid out as `[common prefix | chosen tail | rejected tail]`. Both tails continue the prefix's positions, and a
token sees the tokens before it in its own text only. Several pairs share a row. If the model has full causal attention,
every score then equals that of the text alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

PREFIX = 0  # side of the tokens that all texts of a group share
NO_PAIR = -1

WIDTHS_TRIED = 32
# At about 6 times the hidden size, attention costs as much as a layer's weights; 2,048 suits a small model.
ATTENTION_PAR = 2048


@dataclass
class Group:
    """Token ids of texts that begin with the same `prefix` tokens, fewer than any of them holds."""

    prefix: int
    texts: list[Sequence[int]]

    @property
    def length(self) -> int:
        """Tokens that the group takes in a row: all texts, the common prefix once."""
        return self.prefix + sum(len(text) - self.prefix for text in self.texts)


def group_of(example: Mapping[str, Any]) -> Group:
    """The group of a tokenised pair: its chosen text, then its rejected one."""
    return Group(example["prefix"], [example["chosen_ids"], example["rejected_ids"]])


def by_length(lengths: Sequence[int], cells: int, most: int | None = None) -> list[np.ndarray]:
    """The n places, the longest first, in batches of up to `most` that take at most `cells` when padded."""
    lengths = np.asarray(lengths)
    rest, batches = np.argsort(-lengths, kind="stable"), []
    while len(rest):
        count = min(most or len(rest), max(1, cells // lengths[rest[0]]))
        batches.append(rest[:count])
        rest = rest[count:]
    return batches


def assign_rows(lengths: Sequence[int], limit: float) -> list[list[int]]:
    """Groups in rows, as indices into `lengths`: first fit decreasing, at the row length that is cheapest to compute.

    All rows of a batch get as wide as the fullest one. Long rows leave little padding, short ones little attention to
    compute, so several lengths are tried, from the longest group's up to `limit`.
    """
    if limit == math.inf:
        return [[*range(len(lengths))]]
    longest, total = max(lengths), sum(lengths)
    spare = max(limit - longest, 0)
    cheapest, least = [], math.inf
    for width in sorted({longest + spare * part // WIDTHS_TRIED for part in range(WIDTHS_TRIED + 1)}):
        if total * (ATTENTION_PAR + width) >= least:  # wider rows would cost more even without padding
            break
        rows = _first_fit_decreasing(lengths, width)
        fullest = max(sum(lengths[group] for group in row) for row in rows)
        # The work of a layer, up to a factor: linear in the cells for its weights, cells times width for attention.
        cost = len(rows) * fullest * (ATTENTION_PAR + fullest)
        if cost < least:
            cheapest, least = rows, cost
    return cheapest


def _first_fit_decreasing(lengths: Sequence[int], width: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for group in sorted(range(len(lengths)), key=lambda group: -lengths[group]):
        row = next((row for row, left in enumerate(room) if left >= lengths[group]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(group)
        room[row] -= lengths[group]
    return rows


def pack_texts(groups: Sequence[Group], limit: float, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Lay out groups of texts in R rows of W tokens: at most `limit`, or as many as the longest group has.

    Without a limit (inf) they make one row.

    Returns:
        `input_ids` and `position_ids` (R, W); `attention_mask` (R, W), 1 on tokens and 0 on padding; `pair` (R, W), the
        group's index or `NO_PAIR`; `side` (R, W), `PREFIX` or 1, 2, ... for the group's texts; `score_index` (texts,),
        where the last token of each text stands in the flattened rows, group after group. Without a limit also `spans`
        (texts, 2): tokens that the text takes from the prefix of its group's first text, and those of its own.
    """
    lengths = [group.length for group in groups]
    rows = assign_rows(lengths, limit)
    width = max(sum(lengths[number] for number in row) for row in rows)
    fill = {"input_ids": pad_token_id, "position_ids": 0, "pair": NO_PAIR, "side": PREFIX}
    cells = {name: np.full((len(rows), width), value, dtype=np.int64) for name, value in fill.items()}
    positions = np.arange(width)
    spans: list[tuple[int, int]] = []
    score_index: list[list[int]] = [[] for _ in groups]
    for row, members in enumerate(rows):
        end = 0
        for number in members:
            prefix = groups[number].prefix
            for side, text in enumerate(groups[number].texts, start=1):
                first = 0 if side == 1 else prefix  # the first text brings the prefix along
                start, end = end, end + len(text) - first
                cells["input_ids"][row, start:end] = text[first:]
                cells["position_ids"][row, start:end] = positions[first : len(text)]
                cells["pair"][row, start:end] = number
                cells["side"][row, start + prefix - first : end] = side
                spans.append((first, end - start))
                score_index[number].append(row * width + end - 1)
    packed = {name: torch.from_numpy(array) for name, array in cells.items()}
    packed["attention_mask"] = (packed["pair"] != NO_PAIR).long()
    if limit == math.inf:
        packed["spans"] = torch.tensor(spans)
    packed["score_index"] = torch.tensor([*chain.from_iterable(score_index)])
    return packed


def pad_texts(texts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A row for each of n texts, as `input_ids` and `attention_mask` (n, longest text), padded on the right."""
    ids = [torch.as_tensor(text, dtype=torch.long) for text in texts]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in ids], batch_first=True),
    }


def packed_attention_mask(pair: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """Which token may see which: (R, W) `pair` and `side` of `pack_texts` to a boolean (R, 1, query W, key W) mask.

    Padding sees padding, because a query without any key would turn into NaN.
    """
    same_pair = pair[:, :, None] == pair[:, None, :]
    own_text = (side[:, None, :] == PREFIX) | (side[:, None, :] == side[:, :, None])
    return (same_pair & own_text).tril().unsqueeze(1)
