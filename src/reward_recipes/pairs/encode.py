"""What a pair becomes: token ids that fit, or the reason why it is dropped."""

from enum import IntEnum
from hashlib import blake2b
from os.path import commonprefix
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from reward_recipes.pairs.source import is_conversational
from reward_recipes.pairs.tokens import encode_dialogues, encode_texts
from reward_recipes.run import UserError

ENCODING = 1  # of token ids, hashes and status; raise it when they change, or cached pairs would be used
HH_REPLY = "\n\nAssistant:"


class Status(IntEnum):
    """What happened to a pair on its way to token ids; only KEPT and CUT are trained on."""

    KEPT = 0
    CUT = 1
    BLANK = 2
    IDENTICAL = 3
    IDENTICAL_AFTER_CUT = 4
    OVERLONG = 5


def subset_names(dataset: Dataset) -> list[str]:
    """The names in the column `subset`, in the order of their first rows; none without that column."""
    if "subset" not in dataset.column_names:
        return []
    return [str(name) for name in dataset.unique("subset")]


def status_counts(status: np.ndarray) -> dict[Status, int]:
    """How many pairs have each `Status`, from the (n,) column that `encode_pairs` gives."""
    return dict(zip(Status, np.bincount(status, minlength=len(Status)).tolist(), strict=True))


def usable_pairs(encoded: Dataset, where: str, way: str) -> Dataset:
    """Those of the pairs from `encode_pairs` that can be scored; raises `UserError`, with the way out, for none."""
    status = encoded.with_format("numpy")["status"][:]
    rows = np.flatnonzero(status <= Status.CUT)
    if not len(rows):
        found = {reason.name.lower(): count for reason, count in status_counts(status).items() if count}
        raise UserError(f"{where}: expected pairs that can be used, found all {len(encoded)} dropped: {found}; {way}")
    return encoded if len(rows) == len(encoded) else encoded.select(rows)


def encode_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: str,
    subsets: list[str],
    num_proc: int | None = None,
) -> Dataset:
    """Tokenise pairs into TRL's columns and ours, one row a pair, dropped pairs included (with empty ids).

    Columns: `chosen_ids`, `rejected_ids` (token ids, EOS last, at most `max_length`); `margin` where given;
    `prefix` (tokens common to both sides, at most all but the EOS); `chosen_length`, `rejected_length` (tokens before
    any cut); `status` (`Status`); `row` (number in the source); `subset` (index into `subsets`, -1 without);
    `prompt_id`, `chosen_hash`, `rejected_hash` (64-bit hashes of the first turn and of each side).

    Args:
        overlong: `drop` or `keep_end`, what to do with a pair of which a side is over `max_length`. A pair is dropped
            under `keep_end` too if cutting the common prefix is not enough: both replies stay whole.
        num_proc: processes; by default one, whose tokenizer uses all cores.
    """
    names = {name: index for index, name in enumerate(subsets)}
    features = _encoded_features("margin" in dataset.column_names)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = [
        backend.to_str() if backend else Hasher.hash(tokenizer),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
    ]
    # The tokenizer object's own hash changes once it was called; its serialised state does not.
    fingerprint = Hasher.hash([dataset._fingerprint, state, max_length, overlong, subsets, ENCODING])
    options = {"tokenizer": tokenizer, "conversational": is_conversational(dataset.features), "subsets": names}
    options |= {"max_length": max_length, "overlong": overlong}
    return dataset.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        fn_kwargs=options,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        desc="Tokenising pairs",
    )


def _encoded_features(with_margin: bool) -> Features:
    columns = {name: List(Value("int32")) for name in ("chosen_ids", "rejected_ids")}
    columns |= {name: Value("int32") for name in ("prefix", "chosen_length", "rejected_length", "subset")}
    columns |= {name: Value("int64") for name in ("row", "prompt_id", "chosen_hash", "rejected_hash")}
    columns["status"] = Value("int8")
    return Features(columns | ({"margin": Value("float32")} if with_margin else {}))


def _encode_batch(
    batch: dict[str, list[Any]],
    rows: list[int],
    tokenizer: PreTrainedTokenizerBase,
    conversational: bool,
    max_length: int,
    overlong: str,
    subsets: dict[str, int],
) -> dict[str, list[Any]]:
    sides = list(zip(batch["chosen"], batch["rejected"], strict=True))
    prompts = batch.get("prompt", [""] * len(rows))
    whole = [
        None if _missing(prompt, chosen, rejected) else (join(prompt, chosen), join(prompt, rejected))
        for prompt, (chosen, rejected) in zip(prompts, sides, strict=True)
    ]
    encode = encode_dialogues if conversational else encode_texts
    texts = [text for pair in whole if pair for text in pair]
    ids = iter(encode(tokenizer, texts) if texts else [])
    records = [_fit(next(ids), next(ids), max_length, overlong) if pair else _BLANK for pair in whole]
    columns = {name: [record[name] for record in records] for name in _BLANK}
    columns["row"] = rows
    columns["subset"] = [subsets[str(name)] for name in batch["subset"]] if "subset" in batch else [-1] * len(rows)
    columns["prompt_id"] = [
        _hash(_first_turn(*pair, prompt).encode()) if pair else 0 for pair, prompt in zip(whole, prompts, strict=True)
    ]
    if "margin" in batch:
        columns["margin"] = [float(margin) for margin in batch["margin"]]  # whole ones may be over 64 bits
    return columns


_NO_IDS = np.empty(0, dtype=np.int32)


_BLANK: dict[str, Any] = {
    "chosen_ids": _NO_IDS,
    "rejected_ids": _NO_IDS,
    "prefix": 0,
    "chosen_length": 0,
    "rejected_length": 0,
    "status": Status.BLANK,
    "chosen_hash": 0,
    "rejected_hash": 0,
}


def _missing(prompt: Any, chosen: Any, rejected: Any) -> bool:
    """Whether a pair lacks a side, a prompt, or a message's text; or a side's last turn is blank."""
    messages = [message for part in (prompt, chosen, rejected) if isinstance(part, list) for message in part]
    if any(not m or m.get("content") is None or m.get("role") is None for m in messages):
        return True
    return prompt is None or _blank(chosen) or _blank(rejected)


def _blank(side: str | list[dict[str, str]] | None) -> bool:
    text = side[-1]["content"] if side and isinstance(side, list) else side
    return not text or not text.strip()


def join(prompt: Any, side: Any) -> Any:
    """Prompt and reply as one text or dialogue; a dialogue that already holds the prompt is left as it is.

    Both are text, or lists of messages; a prompt of text before messages becomes a user's turn.
    """
    if isinstance(side, str):
        return prompt + side
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else list(prompt)
    opening = [(turn["role"], turn["content"]) for turn in side[: len(turns)]]
    if opening == [(turn["role"], turn["content"]) for turn in turns] or prompt == _first_user_turn(side):
        return side
    return turns + side


def _first_user_turn(dialogue: list[dict[str, str]]) -> str | None:
    return next((turn["content"] for turn in dialogue if turn["role"] == "user"), None)


def _first_turn(chosen: Any, rejected: Any, prompt: Any) -> str:
    """The dialogue's opening, by which pairs on one prompt are recognised."""
    if isinstance(chosen, list):
        return _first_user_turn(chosen) or chosen[0]["content"]
    if prompt or HH_REPLY in chosen:
        return (prompt or chosen).partition(HH_REPLY)[0]
    common = commonprefix([chosen, rejected])  # noqa: RUF071 (character by character is what is wanted)
    # Two replies may begin with the same letters, so the prompt ends where a word does.
    return common[: max(common.rfind(" "), common.rfind("\n")) + 1] or chosen


def _fit(chosen: list[int], rejected: list[int], max_length: int, overlong: str) -> dict[str, Any]:
    """Make one pair fit `max_length`, or say why it cannot be used."""
    left, right = np.asarray(chosen, dtype=np.int32), np.asarray(rejected, dtype=np.int32)
    record = {
        "chosen_length": len(left),
        "rejected_length": len(right),
        "chosen_hash": _hash(left.tobytes()),
        "rejected_hash": _hash(right.tobytes()),
    }
    status = Status.IDENTICAL if np.array_equal(left, right) else Status.KEPT
    excess = max(len(left), len(right)) - max_length
    if excess > 0 and status == Status.KEPT:
        in_replies = excess > common_prefix_length(left, right)
        left, right, status = left[excess:], right[excess:], Status.CUT
        if overlong == "keep_end" and np.array_equal(left, right):
            status = Status.IDENTICAL_AFTER_CUT
        elif overlong == "drop" or in_replies:
            status = Status.OVERLONG
    if status > Status.CUT:
        left, right = left[:0], right[:0]
    return record | {
        "chosen_ids": left,
        "rejected_ids": right,
        "prefix": common_prefix_length(left, right),
        "status": status,
    }


def common_prefix_length(left: np.ndarray, right: np.ndarray) -> int:
    """Tokens common to the start of both sides, leaving at least the last token (EOS) of each."""
    shorter = min(len(left), len(right)) - 1
    differs = np.flatnonzero(left[:shorter] != right[:shorter]) if shorter > 0 else []
    return int(differs[0]) if len(differs) else max(shorter, 0)


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big", signed=True)


def split_by_prompt(prompt_ids: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to keep and to hold out, so that no first-turn prompt is on both sides.

    Whole prompts are drawn in random order while they still fit, so the held-out part has `round(fraction * n)` rows
    wherever single-pair prompts are common enough to fill it.

    Args:
        prompt_ids: (n,) hashes of the first turns.
        fraction: share of rows to hold out.
        seed: of the draw.

    Returns:
        Two sorted arrays of row numbers.
    """
    prompts, group, sizes = np.unique(prompt_ids, return_inverse=True, return_counts=True)
    room = round(fraction * len(prompt_ids))
    held_out = np.zeros(len(prompts), dtype=bool)
    for prompt in np.random.default_rng(seed).permutation(len(prompts)):
        if sizes[prompt] <= room:
            held_out[prompt] = True
            room -= sizes[prompt]
    return np.flatnonzero(~held_out[group]), np.flatnonzero(held_out[group])
