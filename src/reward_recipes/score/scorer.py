"""From texts to rewards, the one way for files, evaluation and policies: right tokens, EOS last, scored at the end."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from reward_recipes.packing import Group, ScoreTap, group_length, pack_texts, packing_difference, unsupported
from reward_recipes.pairs import (
    NEW_PAD_TOKEN,
    Messages,
    common_prefix_length,
    encode_dialogues,
    encode_texts,
    load_tokenizer,
)
from reward_recipes.run import UserError, check_source, first_line
from reward_recipes.score.model import NEW_HEAD, fit_to_tokenizer, load_classifier, max_positions

CELLS_PER_CALL = {"cpu": 1024, "cuda": 65536}  # tokens, padding included, that the model computes at once
DTYPES = ("float32", "bfloat16", "float16")

PACKED_ROW = 1024  # tokens of a packed row

Text = str | Messages
Place = tuple[int, int]  # a group's number, and the place of a text in it


class Scorer:
    """A trained reward model that scores texts, each as if it were scored alone.

    Texts are sorted by length into padded batches. Texts that begin alike and are given as a group (replies to one
    prompt, the sides of a pair) share a packed row that holds the beginning once, where that is exact for the model.

    Args:
        model: with one label, in eval mode, on its device.
        tokenizer: with a pad token that differs from EOS.
        max_length: most tokens of a text, EOS included.
        overlong: what becomes of a longer one: `drop`, no score, or `keep_end`, its end is scored.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: str = "drop"
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.overlong = max_length, overlong
        self.cells = CELLS_PER_CALL.get(model.device.type, CELLS_PER_CALL["cuda"])
        self._may_pack = unsupported(model, max_length) is None
        self._tap: ScoreTap | None = None

    def score(self, texts: Sequence[Text]) -> list[float | None]:
        """Rewards of texts, or of dialogues as lists of messages; None for one that is too long under `drop`.

        Raises:
            UserError: dialogues without a chat template, or one that the template rejects.
        """
        return [rewards[0] for rewards in self.score_groups([[text] for text in texts])]

    def score_groups(self, groups: Sequence[Sequence[Text]]) -> list[list[float | None]]:
        """As `score`, for groups of texts that begin alike, such as several replies to one prompt.

        `data.join(prompt, reply)` puts a text together as training does.
        """
        encoded = iter(self.encode([text for group in groups for text in group]))
        ids = [[next(encoded) for _ in group] for group in groups]
        scored = self.score_ids([[text for text in group if text] for group in ids])
        rewards = (reward for group in scored for reward in group)
        return [[next(rewards) if text else None for text in group] for group in ids]

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids of each text, EOS last; empty for one that is too long under `drop`."""
        encoded: list[list[int]] = [[] for _ in texts]
        for kind, encode in ((str, encode_texts), (list, encode_dialogues)):
            places = [place for place, text in enumerate(texts) if isinstance(text, kind)]
            if places:
                for place, ids in zip(places, encode(self.tokenizer, [texts[p] for p in places]), strict=True):
                    encoded[place] = self._fit(ids)
        return encoded

    def _fit(self, ids: list[int]) -> list[int]:
        return [] if self.overlong == "drop" and len(ids) > self.max_length else ids[-self.max_length :]

    def score_pairs(self, pairs: Dataset) -> np.ndarray:
        """Scores (n, 2), chosen first, of tokenised pairs that `data.encode_pairs` kept or cut."""
        columns = pairs.select_columns(["chosen_ids", "rejected_ids"]).with_format("numpy")
        scores = [
            self.score_ids(list(zip(part["chosen_ids"], part["rejected_ids"], strict=True)))
            for part in columns.iter(batch_size=2048)
        ]
        return np.concatenate(scores)

    @torch.no_grad()
    def score_ids(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Scores at the last token of each text, by group.

        Args:
            groups: token ids of texts that begin alike; a group may hold one text, or none.

        Raises:
            UserError: a score is not finite.
        """
        scores: list[list[float]] = [[0.0] * len(group) for group in groups]
        shared: list[tuple[list[Place], Group]] = []
        alone: list[tuple[Place, Sequence[int]]] = []
        for number, group in enumerate(groups):
            prefix = _common_prefix(group)
            if prefix and self._packs(group):
                shared += _parts(number, prefix, group)
            else:
                alone += [((number, place), text) for place, text in enumerate(group)]
        for batch in _batches(shared, self.cells, size=lambda item: group_length(item[1])):
            places = [place for group_places, _ in batch for place in group_places]
            for (number, place), score in zip(places, self._packed([group for _, group in batch]), strict=True):
                scores[number][place] = score
        for batch in _batches(alone, self.cells, size=lambda item: len(item[1])):
            for ((number, place), _), score in zip(batch, self._padded([text for _, text in batch]), strict=True):
                scores[number][place] = score
        if not all(math.isfinite(score) for group in scores for score in group):
            raise UserError("expected finite scores, found inf or nan; the model is broken, or needs --dtype float32")
        return scores

    def _packs(self, group: Sequence[Sequence[int]]) -> bool:
        """Whether packing is exact for the model, found out on the first group that would be packed."""
        if self._tap is None and self._may_pack:
            chosen, rejected = group[:2]
            pair = {"chosen_ids": chosen, "rejected_ids": rejected, "prefix": _common_prefix(group[:2])}
            difference = packing_difference(self.model, [pair | {"row": 0, "subset": -1}], PACKED_ROW)
            self._may_pack = difference is None
            self._tap = ScoreTap(self.model) if self._may_pack else None
        return self._may_pack

    def _packed(self, groups: Sequence[Group]) -> list[float]:
        batch = pack_texts(groups, PACKED_ROW, self.tokenizer.pad_token_id)
        on_device = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        return self._tap.forward(self.model, **on_device).logits.squeeze(-1).float().tolist()

    def _padded(self, texts: Sequence[Sequence[int]]) -> list[float]:
        width = max(map(len, texts))
        ids = torch.full((len(texts), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.as_tensor(text), 1
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        return logits.squeeze(-1).float().tolist()


def _common_prefix(group: Sequence[Sequence[int]]) -> int:
    """Tokens that all texts begin with, at least the last token of each left over; 0 for one text."""
    if len(group) < 2:
        return 0
    arrays = [np.asarray(text) for text in group]
    return min(common_prefix_length(arrays[0], other) for other in arrays[1:])


def _parts(number: int, prefix: int, group: Sequence[Sequence[int]]) -> list[tuple[list[Place], Group]]:
    """A group as groups that fit a packed row each, because attention costs a row's length squared."""
    parts: list[tuple[list[Place], Group]] = []
    for place, text in enumerate(group):
        if not parts or group_length(parts[-1][1]) + len(text) - prefix > PACKED_ROW:
            parts.append(([], (prefix, [])))
        parts[-1][0].append((number, place))
        parts[-1][1][1].append(text)
    return parts


def _batches(items: list[Any], cells: int, size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Items from the longest to the shortest, in batches of at most `cells` when padded to the first one's length."""
    items = sorted(items, key=size, reverse=True)
    while items:
        count = max(1, cells // size(items[0]))
        yield items[:count]
        items = items[count:]


def load_scorer(
    name_or_path: str | Path, dtype: str = "float32", device: str | None = None, revision: str = "main"
) -> Scorer:
    """Load a reward model: a run's `output_dir`, an adapter folder of it, or a hub id of either kind.

    Args:
        name_or_path: folder or hub id.
        dtype: of the weights: `float32`, `bfloat16` or `float16`; the head computes in float32 whatever it is.
        device: such as `cuda:1`; by default a GPU if there is one.
        revision: of the hub repository.

    Returns:
        A scorer with the `max_length` and `overlong` of the model's training; for a model that another tool trained,
        as many tokens as it has positions, and `drop`.

    Raises:
        UserError: no reward model there (a base model's head would be random), or one that cannot be read.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    name_or_path = str(name_or_path)
    tokenizer = load_tokenizer(name_or_path, revision)
    options = {"dtype": getattr(torch, dtype)}
    if find_adapter_config_file(name_or_path, revision=revision):
        model = _load_adapter(name_or_path, revision, tokenizer, options)
    else:
        model = load_classifier(name_or_path, revision=revision, **options)
        _check_vocabulary(name_or_path, model, tokenizer)
        fit_to_tokenizer(model, tokenizer)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    policy = getattr(model.config, "reward_recipes", None) or {}
    known = min(max_positions(model) or tokenizer.model_max_length, tokenizer.model_max_length)
    max_length = policy.get("max_length") or known
    return Scorer(model, tokenizer, max_length, policy.get("overlong", "drop"))


def _check_vocabulary(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad token may be new, since nothing reads its embedding; any other would be scored by random weights."""
    known = model.get_input_embeddings().num_embeddings
    largest = max(number for token, number in tokenizer.get_vocab().items() if token != NEW_PAD_TOKEN)
    if largest >= known:
        raise UserError(
            f"{name}: expected a tokenizer of at most {known} tokens, the model's, found {largest + 1}; "
            "copy the tokenizer that the model was trained with"
        )


def _load_adapter(
    name_or_path: str, revision: str, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> PreTrainedModel:
    """The adapter's base model with the adapter and its head merged in, and its training's policy."""
    if Path(name_or_path).is_dir() and not (Path(name_or_path) / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise UserError(
            f"{name_or_path}: expected the adapter's weights in {SAFETENSORS_WEIGHTS_NAME}, found none; a "
            "pickle may hold code, so save the adapter again with a current peft"
        )
    adapter = PeftConfig.from_pretrained(name_or_path, revision=revision)
    base_name = adapter.base_model_name_or_path
    if adapter.task_type != "SEQ_CLS" or not base_name:
        raise UserError(
            f"{name_or_path}: expected a reward model's adapter (task_type SEQ_CLS, with its base model's name), found "
            f"task_type {adapter.task_type} on {base_name}; an adapter of another kind has no score head"
        )
    check_source(f"base_model_name_or_path in {name_or_path}", base_name)
    base = load_classifier(base_name, may_lack=NEW_HEAD, revision=adapter.revision or "main", **options)
    _check_vocabulary(base_name, base, tokenizer)
    fit_to_tokenizer(base, tokenizer)
    with suppress(OSError, ValueError, AttributeError):  # adapters of other tools bring no such config.json
        base.config.reward_recipes = AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=False
        ).reward_recipes
    try:
        return PeftModel.from_pretrained(base, name_or_path, revision=revision).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        found = first_line(error)
        raise UserError(f"adapter {name_or_path}: expected weights that fit {base_name}, found: {found}") from error
