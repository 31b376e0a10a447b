"""From texts to rewards: files, evaluation and policies all score through this module."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from reward_recipes.packing import (
    Group,
    ScoreTap,
    by_length,
    pack_texts,
    packing_difference,
    pad_texts,
    row_limit,
    unsupported,
)
from reward_recipes.pairs import Text, common_prefix_length, encode_texts, load_tokenizer
from reward_recipes.run import UserError, expect, first_line
from reward_recipes.score.model import NEW_HEAD, fit_to_tokenizer, load_classifier, max_positions

CELLS_ON_CPU, CELLS_ELSEWHERE = 1024, 65536  # tokens, padding included, that the model computes at once
PACKED_ROW = 1024  # tokens of a packed row

# A group that is computed in one row, and where the score of each of its texts belongs: number of group and of text.
Part = tuple[Group, list[tuple[int, int]]]


class Scorer:
    """A trained reward model that scores texts, each as if it were scored alone.

    Texts that begin alike and are given as a group (replies to one prompt, the sides of a pair) share a packed row that
    holds the beginning once, where that is exact for the model.

    Args:
        model: with one label, in eval mode, on its device.
        tokenizer: with a pad token that differs from EOS.
        max_length: most tokens of a text, EOS included.
        overlong: whether a longer one has no score (`drop`), or its end is scored (`keep_end`).
        as_is: texts are read as plain transformers reads them, which adds no EOS.
        unread: the model's own pad token, which plain transformers skips when it looks for the last token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        overlong: str = "drop",
        as_is: bool = False,
        unread: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.overlong = max_length, overlong
        self.as_is, self.unread = as_is, unread
        self.cells: int | None = None  # most tokens of a forward pass, padding included; by default the device's
        self._may_pack = unsupported(model, max_length) is None
        self._limit: float = PACKED_ROW  # until the first group is packed, on the device that the model has by then
        self._tap: ScoreTap | None = None

    def score(self, texts: Sequence[Text]) -> list[float | None]:
        """Rewards of texts, or of dialogues as lists of messages; None for one that is too long under `drop`.

        Raises `UserError` for a dialogue that has no chat template, or that the template rejects.
        """
        return [rewards[0] for rewards in self.score_groups([[text] for text in texts])]

    def score_groups(self, groups: Sequence[Sequence[Text]]) -> list[list[float | None]]:
        """As `score`, for groups of texts that begin alike, such as several replies to one prompt."""
        ids = iter(self.encode([text for group in groups for text in group]))
        return self.score_ids([list(islice(ids, len(group))) for group in groups])

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids of each text, EOS last unless `as_is`; empty for one that is too long under `drop`."""
        keeps_end = self.overlong != "drop"
        found = encode_texts(self.tokenizer, texts, self.as_is)
        return [ids[-self.max_length :] if keeps_end or len(ids) <= self.max_length else [] for ids in found]

    def score_pairs(self, pairs: Dataset) -> np.ndarray:
        """Scores (n, 2), chosen first, of tokenised pairs that `pairs.encode_splits` kept or cut, by all processes."""
        columns = pairs.select_columns(["chosen_ids", "rejected_ids"]).with_format("numpy")

        def score(own: Dataset) -> list[list[float | None]]:
            parts = (list(zip(*part.values(), strict=True)) for part in own.iter(batch_size=2048))
            return [scores for part in parts for scores in self.score_ids(part)]

        return np.array(by_all_processes(columns, score))

    @property
    def form(self) -> str | None:
        """`text` or `messages`, what the model was trained on; None for a model that does not say."""
        return (getattr(self.model.config, "reward_recipes", None) or {}).get("form")

    @property
    def convention(self) -> str:
        """How texts are read, in one line."""
        if self.as_is:
            return "another tool's model, read as plain transformers reads it: own chat template, no EOS added"
        return "read as in its training: each text ends in one EOS"

    @torch.no_grad()
    def score_ids(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[list[float | None]]:
        """Scores at the last of each text's token ids, by groups that begin alike; None for a text without tokens.

        Raises `UserError` for a score that is not finite.
        """
        cells = self.cells or (CELLS_ON_CPU if self.model.device.type == "cpu" else CELLS_ELSEWHERE)
        scores: list[list[float | None]] = [[None] * len(group) for group in groups]
        packed: list[Part] = []
        alone: list[Part] = []
        for number, group in enumerate(groups):
            texts = {(number, place): self._read(ids) for place, ids in enumerate(group) if len(ids)}
            prefix = _common_prefix([*texts.values()])
            if prefix and self._packs([*texts.values()]):
                packed += _parts(prefix, texts, min(PACKED_ROW, cells))
            else:
                alone += [(Group(0, [ids]), [place]) for place, ids in texts.items()]
        for parts in (packed, alone):
            for indices in by_length([group.length for group, _ in parts], cells):
                batch = [parts[index] for index in indices]
                logits = self._logits([group for group, _ in batch]).squeeze(-1).float().tolist()
                places = [place for _, places in batch for place in places]
                for (number, place), score in zip(places, logits, strict=True):
                    scores[number][place] = score
        if not all(score is None or math.isfinite(score) for group in scores for score in group):
            raise UserError("expected finite scores, found inf or nan; the model is broken, or needs --dtype float32")
        return scores

    def _read(self, ids: Sequence[int]) -> Sequence[int]:
        while len(ids) > 1 and ids[-1] == self.unread:
            ids = ids[:-1]
        return ids

    def _packs(self, texts: Sequence[Sequence[int]]) -> bool:
        """Whether packing is exact for the model, found out on the first group that would be packed."""
        if self._may_pack and self._tap is None:
            two = Group(_common_prefix(texts[:2]), list(texts[:2]))
            self._limit = row_limit(PACKED_ROW, self.model.device)
            self._may_pack = packing_difference(self.model, [two], self._limit) is None
            self._tap = ScoreTap(self.model, self._limit) if self._may_pack else None
        return self._may_pack

    def _logits(self, groups: Sequence[Group]) -> torch.Tensor:
        """Logits (texts, 1), from rows that groups share, or from a row for each where nothing is shared."""
        pad, is_packed = self.tokenizer.pad_token_id, groups[0].prefix > 0
        if is_packed:
            batch = pack_texts(groups, self._limit, pad)
        else:
            batch = pad_texts([group.texts[0] for group in groups], pad)
        on_device = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        found = self._tap.forward(self.model, **on_device) if is_packed else self.model(**on_device, use_cache=False)
        return found.logits


def by_all_processes(items: Any, work: Callable[[Any], list[Any]]) -> list[Any]:
    """What `work` gives for a list or data set, of which each process takes a part; in order, and whole on each.

    A `UserError` on one process is raised on all: the others would wait for it.
    """
    with PartialState().split_between_processes(items) as own:
        try:
            found = work(own)
        except UserError as error:
            found = [error]
    whole = gather_object(found)
    for failure in (part for part in whole if isinstance(part, UserError)):
        raise failure
    return whole


def _common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Tokens that all texts begin with, at least the last token of each left over; 0 for one text."""
    arrays = [np.asarray(text) for text in texts]
    return min((common_prefix_length(arrays[0], other) for other in arrays[1:]), default=0)


def _parts(prefix: int, texts: Mapping[tuple[int, int], Sequence[int]], width: int) -> list[Part]:
    """A group, by its texts' places, in parts that fit a row of `width`: attention costs a row's length squared."""
    parts: list[Part] = []
    for place, text in texts.items():
        if not parts or parts[-1][0].length + len(text) - prefix > width:
            parts.append((Group(prefix, []), []))
        parts[-1][0].texts.append(text)
        parts[-1][1].append(place)
    return parts


def load_scorer(
    name_or_path: str | Path, dtype: str = "float32", device: str | None = None, revision: str = "main"
) -> Scorer:
    """Load a reward model: a run's `output_dir`, an adapter folder of it, or a hub id of either kind.

    It has the `max_length` and `overlong` of its training. A model that another tool trained takes as many tokens as it
    has positions, drops longer texts, and reads texts as plain transformers does.

    Args:
        dtype: of the weights: `float32`, `bfloat16` or `float16`; the head computes in float32 whatever it is.
        device: such as `cuda:1`; by default the GPU of this process if there is one.

    Raises:
        UserError: no reward model there (a base model's head would be random), or one that cannot be read.
    """
    expect(dtype in ("float32", "bfloat16", "float16"), "dtype", "float32, bfloat16 or float16", dtype)
    name, weights = str(name_or_path), getattr(torch, dtype)
    tokenizer = load_tokenizer(name, revision)
    is_adapter = find_adapter_config_file(name, revision=revision)
    load = _load_base if is_adapter else load_classifier
    model = load(name, revision=revision, dtype=weights)
    # One token may be new, a pad token, whose embedding nothing reads; others would be scored by random weights.
    known, own_pad = model.get_input_embeddings().num_embeddings, model.config.pad_token_id
    fits = len(tokenizer) <= known + 1
    expect(fits, name, f"the model's own tokenizer, of at most {known} tokens", len(tokenizer))
    fit_to_tokenizer(model, tokenizer)
    model = _with_adapter(model, name, revision) if is_adapter else model
    model = model.to(device or _own_device()).eval()
    if limits := getattr(model.config, "reward_recipes", None):
        return Scorer(model, tokenizer, limits["max_length"], limits["overlong"])
    most = min(max_positions(model) or tokenizer.model_max_length, tokenizer.model_max_length)
    return Scorer(model, tokenizer, most, as_is=True, unread=own_pad)


def _own_device() -> str:
    """By the launcher's number of the process, since a process may not have joined the others yet."""
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}" if on_gpu else "cpu"


def _load_base(name: str, revision: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base model of an adapter, with the head that the adapter is to fill."""
    adapter = PeftConfig.from_pretrained(name, revision=revision)
    base, kind = adapter.base_model_name_or_path, adapter.task_type
    expect(kind == "SEQ_CLS" and base, name, "a reward model's adapter (SEQ_CLS)", f"{kind} on {base}")
    return load_classifier(base, may_lack=NEW_HEAD, revision=adapter.revision or "main", dtype=dtype)


def _with_adapter(base: PreTrainedModel, name: str, revision: str) -> PreTrainedModel:
    """The base model with adapter and head merged in, and the limits of their training."""
    with suppress(OSError, ValueError, AttributeError):  # adapters of other tools bring no such config.json
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        base.config.reward_recipes = config.reward_recipes
    try:
        return PeftModel.from_pretrained(base, name, revision=revision).merge_and_unload()
    except Exception as error:  # a broken file, or a base model of another size, makes peft raise almost anything
        expected = f"weights that fit {base.name_or_path}"
        raise UserError(f"{name}: expected {expected}, found: {first_line(error)}") from error
