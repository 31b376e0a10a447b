"""Which pairs answer the same prompt: known by a column, messages or a layout's marker, else by shared beginnings."""

from collections.abc import Collection, Mapping
from enum import IntEnum
from hashlib import blake2b
from math import ceil
from os.path import commonprefix

import numpy as np
from datasets import Dataset

from reward_recipes.pairs.dialogue import HH_REPLY, MARKERS, Messages, spaced, text_of
from reward_recipes.run import UserError, numbers_of

SHARE_TOLERANCE = 0.02  # of the pairs, by which a held-out part may miss the share that was asked for


class KnownBy(IntEnum):
    """By what the prompt of a pair was recognised."""

    COLUMN = 0
    MESSAGES = 1
    HH_LAYOUT = 2
    MARKER = 3
    BEGINNING = 4


def first_turn(
    prompt: str | Messages | None, chosen: str | Messages, rejected: str | Messages, marker: str | None = None
) -> tuple[KnownBy, str]:
    """How the prompt of a pair was found, and its text, by which pairs on one prompt are recognised.

    Where nothing marks it, that is the words that both sides begin with: the prompt and what the replies share. In HH's
    format and of messages each character counts: earlier runs drew their validation pairs by those.

    Args:
        prompt: the column's, if there is one; `chosen` and `rejected` are joined with it.
        marker: what stands before the first reply of whole texts, beside the layouts that are known.
    """
    if isinstance(chosen, list):
        turn = next((turn for turn in chosen if turn["role"] == "user"), chosen[0])
        return KnownBy.MESSAGES, text_of(turn)
    if isinstance(prompt, str) and prompt.strip():
        found = next(iter(_markers_in(prompt, marker)), None)
        before = prompt.partition(found)[0] if found else prompt
        return KnownBy.COLUMN, before if found == HH_REPLY else spaced(before)
    for known in _markers_in(chosen, marker):
        before = chosen.partition(known)[0]
        if known == HH_REPLY and before.lstrip().startswith("Human:"):
            return KnownBy.HH_LAYOUT, before
        if spaced(before) and spaced(before) == spaced(rejected.partition(known)[0]):  # else it stands in a reply
            return KnownBy.MARKER, spaced(before)
    return KnownBy.BEGINNING, " ".join(commonprefix([chosen.split(), rejected.split()]))  # noqa: RUF071 (of words)


def _markers_in(text: str, marker: str | None) -> list[str]:
    """What may stand before the first reply, the user's own first, then in the order of the text."""
    own = [marker] if marker and marker in text else []
    return own + sorted((known for known in MARKERS if known in text), key=text.find)


def group_beginnings(beginnings: Collection[str]) -> dict[str, str]:
    """The group of each beginning; pairs that may answer the same prompt are in one group.

    A pair's prompt lies within the words that its sides begin with, but nobody knows where it ends. What all pairs
    begin with is left aside. Of the rest, the first third is taken for a part of the prompt: all pairs that begin alike
    that far are one group. Two pairs on one prompt stay together unless the replies of both begin alike for longer than
    twice the prompt.
    """
    words = {text: tuple(text.split()) for text in beginnings}
    shared = len(commonprefix([*words.values()]))  # noqa: RUF071 (of words)
    claims = {found[: shared + ceil((len(found) - shared) / 3)] for found in words.values()}
    lengths = sorted({len(claim) for claim in claims})
    return {
        text: " ".join(next(found[:length] for length in lengths if found[:length] in claims))
        for text, found in words.items()
    }


def name_prompts(encoded: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The splits of a source with `prompt_id` filled in where only the beginnings of all pairs together tell it.

    The column `beginning`, which goes, is null where the prompt is known.
    """
    groups = group_beginnings({text for split in encoded.values() for text in split.unique("beginning")} - {None})
    named = {}
    for name, split in encoded.items():
        named[name] = split.remove_columns("beginning")
        if groups:
            known = zip(numbers_of(split, "prompt_id"), split["beginning"][:], strict=True)
            ids = np.array([prompt if text is None else hash64(groups[text].encode()) for prompt, text in known])
            named[name] = named[name].remove_columns("prompt_id").add_column("prompt_id", ids)
    return named


def hash64(content: bytes) -> int:
    """A signed 64-bit hash that is the same in every process."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big", signed=True)


def split_by_prompt(prompt_ids: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted numbers of the rows to keep and to hold out, so that no first-turn prompt is on both sides.

    Whole prompts are drawn in random order while they still fit, so the held-out part has `round(fraction * n)` rows
    wherever single-pair prompts are common enough to fill it.

    Args:
        prompt_ids: (n,) hashes of the first turns.
    """
    prompts, group, sizes = np.unique(prompt_ids, return_inverse=True, return_counts=True)
    room = round(fraction * len(prompt_ids))
    held_out = np.zeros(len(prompts), dtype=bool)
    for prompt in np.random.default_rng(seed).permutation(len(prompts)):
        if sizes[prompt] <= room:
            held_out[prompt] = True
            room -= sizes[prompt]
    return np.flatnonzero(~held_out[group]), np.flatnonzero(held_out[group])


def hold_out(pairs: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """The pairs to train on and those to validate on, by `split_by_prompt`.

    Raises:
        UserError: whole prompts do not give the share that was asked for.
    """
    prompts = numbers_of(pairs, "prompt_id")
    kept, held_out = split_by_prompt(prompts, fraction, seed)
    asked = fraction * len(pairs)
    if not len(kept) or not len(held_out) or abs(len(held_out) - asked) > max(1, SHARE_TOLERANCE * len(pairs)):
        _, sizes = np.unique(prompts, return_counts=True)
        raise UserError(
            f"validation_fraction={fraction}: expected about {asked:.0f} of {len(pairs)} pairs, found {len(held_out)} "
            f"that can be held out by whole prompts ({len(sizes)} prompts, the largest of {sizes.max()} pairs); change "
            "it, or say by --prompt_marker what stands before a reply"
        )
    return pairs.select(kept), pairs.select(held_out)
