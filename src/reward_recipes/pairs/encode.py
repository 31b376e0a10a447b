"""What a pair becomes: token ids that fit, or the reason why it is dropped."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from reward_recipes.pairs.dialogue import Dialogue, is_blank, join, last_reply, with_template_values
from reward_recipes.pairs.prompts import KnownBy, first_turn, hash64, name_prompts
from reward_recipes.pairs.source import Pairs
from reward_recipes.pairs.tokens import Written, as_turns, encode_written, leaves_calls_out, write
from reward_recipes.run import UserError, numbers_of

ENCODING = 4  # of token ids, hashes and status; raise it when they change, or cached pairs would be used


class Status(IntEnum):
    """What happened to a pair on its way to token ids. Only KEPT and CUT are used; the order says so (`<= CUT`)."""

    KEPT = 0
    CUT = 1
    BLANK = 2
    IDENTICAL = 3
    IDENTICAL_AFTER_CUT = 4
    OVERLONG = 5


# The columns of a type, and what a blank pair has there.
_KINDS = (
    (List(Value("int32")), np.empty(0, dtype=np.int32), "chosen_ids rejected_ids"),
    (Value("int32"), 0, "prefix chosen_length rejected_length subset chosen_characters rejected_characters"),
    (Value("int64"), 0, "row prompt_id chosen_hash rejected_hash"),
    (Value("int8"), 0, "status known_by"),
    (Value("bool"), False, "special_tokens left_out"),
    (Value("string"), None, "beginning"),
)
_BLANK = {name: value for _, value, names in _KINDS for name in names.split()} | {"status": Status.BLANK}


def _features(with_margin: bool) -> Features:
    columns = {name: kind for kind, _, names in _KINDS for name in names.split()}
    return Features(columns | ({"margin": Value("float32")} if with_margin else {}))


def subset_names(splits: Mapping[str, Pairs]) -> list[str]:
    """The names in the column `subset`, sorted; none without that column."""
    columns = [pairs.rows for pairs in splits.values() if "subset" in pairs.rows.column_names]
    return sorted({str(name) for rows in columns for name in rows.unique("subset")})


def status_counts(status: np.ndarray) -> dict[Status, int]:
    """How many pairs have each `Status`, from the (n,) column that `encode_splits` gives."""
    return dict(zip(Status, np.bincount(status, minlength=len(Status)).tolist(), strict=True))


def usable_pairs(encoded: Dataset, where: str, way: str) -> Dataset:
    """The pairs from `encode_splits` that can be used; raises `UserError` with `way`, the way out, if there is none."""
    status = numbers_of(encoded, "status")
    rows = np.flatnonzero(status <= Status.CUT)
    if not len(rows):
        found = {reason.name.lower(): count for reason, count in status_counts(status).items() if count}
        raise UserError(f"{where}: expected pairs that can be used, found all {len(encoded)} dropped: {found}; {way}")
    return encoded if len(rows) == len(encoded) else encoded.select(rows)


def encode_splits(
    splits: Mapping[str, Pairs],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: str,
    subsets: list[str],
    num_proc: int | None = None,
    **options: Any,
) -> dict[str, Dataset]:
    """Tokenise pairs into TRL's columns and ours, one row a pair, dropped pairs included (with empty ids).

    Columns: `chosen_ids`, `rejected_ids` (token ids, EOS last, at most `max_length`); `margin` where given;
    `prefix` (tokens common to both sides, at most all but the EOS); `chosen_length`, `rejected_length` (tokens before
    any cut); `chosen_characters`, `rejected_characters` (of the last reply); `status` (`Status`); `row` (number in the
    source); `subset` (index into `subsets`, -1 without); `prompt_id`, `chosen_hash`, `rejected_hash` (64-bit hashes of
    the first turn and of each side); `known_by` (`KnownBy`, of the first turn); `special_tokens` and `left_out`
    (whether a plain text holds special tokens, and whether the chat template writes nothing of tools, of calls, or of
    what tells the sides apart).

    Args:
        splits: of one source; which pairs share a prompt may show only in all of them.
        num_proc: processes; by default one, whose tokenizer uses all cores.
        options: further fields of `PairEncoder`, which says what they and the other arguments do.

    Raises:
        UserError: a row that cannot be joined, or that the chat template rejects; it names the place.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # The tokenizer object's own hash changes once it was called; its serialised state does not.
    written = backend.to_str() if backend else Hasher.hash(tokenizer)
    state = [written, tokenizer.chat_template, tokenizer.special_tokens_map]
    encoder = PairEncoder(tokenizer, max_length, overlong, tuple(subsets), **options)
    settings = replace(encoder, tokenizer=None)
    encoded = {}
    for name, pairs in splits.items():
        encoded[name] = pairs.rows.map(
            encoder.encode,
            batched=True,
            with_indices=True,
            fn_kwargs={"pairs": pairs},
            remove_columns=pairs.rows.column_names,
            features=_features("margin" in pairs.rows.column_names),
            num_proc=num_proc,
            new_fingerprint=Hasher.hash([pairs.rows._fingerprint, sorted(pairs.messages), state, settings, ENCODING]),
            desc="Tokenising pairs",
        )
    return name_prompts(encoded)


@dataclass(frozen=True)
class PairEncoder:
    """Turns rows of `Pairs` into the columns of `encode_splits`.

    Attributes:
        overlong: `drop` or `keep_end`, what to do with a pair of which a side is over `max_length`. A pair is dropped
            under `keep_end` too if cutting the common prefix is not enough: both replies stay whole.
        subsets: names, by whose place here the column `subset` numbers them.
        marker: what stands before the first reply of whole texts, if it is none that is known.
        as_messages: whether text beside a text prompt becomes messages, for a model that was trained on those.
        as_is: whether no EOS is added, see `tokens.encode_texts`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    overlong: str
    subsets: tuple[str, ...]
    marker: str | None = None
    as_messages: bool = False
    as_is: bool = False

    def encode(self, batch: dict[str, list[Any]], rows: list[int], pairs: Pairs) -> pa.Table:
        """Encode a batch of the rows of `pairs`."""
        records, written = [], []
        for number, values in zip(rows, zip(*batch.values(), strict=True), strict=True):
            try:
                record, sides = self._written(pairs.parsed(dict(zip(batch, values, strict=True))))
            except (ValueError, UserError) as error:
                raise UserError(f"{pairs.place(number)}: {error}") from error
            records.append(record | {"row": number})
            written += sides
        ids = encode_written(self.tokenizer, written, self.as_is)
        plain = [side.string if side.is_plain else "" for side in written]
        special = [token for token in self.tokenizer.all_special_tokens if any(token in text for text in plain)]
        kept = (record for record in records if record["status"] == Status.KEPT)
        for record, first in zip(kept, range(0, len(ids), 2), strict=True):
            both = slice(first, first + 2)
            record["special_tokens"] = any(token in text for token in special for text in plain[both])
            record |= self._fitted(*ids[both])
        schema = _features("margin" in batch).arrow_schema
        return pa.table({name: [record[name] for record in records] for name in schema.names}, schema=schema)

    def _written(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[Written]]:
        """A row's record so far, and both sides to tokenise; none of a blank row."""
        record: dict[str, Any] = dict(_BLANK)
        record["subset"] = self.subsets.index(str(row["subset"])) if "subset" in row else -1
        if "margin" in row:
            record["margin"] = row["margin"]
        prompt, sides = row.get("prompt", ""), [row["chosen"], row["rejected"]]
        if prompt is None or any(is_blank(side) for side in sides):
            return record, []
        if self.as_messages:
            prompt = as_turns(self.tokenizer, prompt)
        whole = join(prompt, sides)
        if isinstance(whole[0], str) != isinstance(whole[1], str):
            raise ValueError(
                "expected 'chosen' and 'rejected' alike, found text and messages; make them one or the other"
            )
        known_by, opening = first_turn(prompt, *whole, self.marker)
        beginning = opening if known_by == KnownBy.BEGINNING else None
        record |= {"status": Status.KEPT, "known_by": known_by, "beginning": beginning}
        record["prompt_id"] = 0 if beginning is not None else hash64(opening.encode())
        record["chosen_characters"], record["rejected_characters"] = (len(last_reply(prompt, side)) for side in whole)
        texts = [with_template_values(text, row) for text in whole]
        written = [write(self.tokenizer, text, self.as_is) for text in texts]
        if isinstance(texts[0], Dialogue):
            is_lost = texts[0] != texts[1] and written[0] == written[1]
            record["left_out"] = is_lost or any(leaves_calls_out(self.tokenizer, text) for text in texts)
        return record, written

    def _fitted(self, chosen: list[int], rejected: list[int]) -> dict[str, Any]:
        """What one pair becomes that fits `max_length`, or the reason why it cannot be used."""
        left, right = np.asarray(chosen, dtype=np.int32), np.asarray(rejected, dtype=np.int32)
        record = {"chosen_length": len(left), "rejected_length": len(right)}
        record |= {"chosen_hash": hash64(left.tobytes()), "rejected_hash": hash64(right.tobytes())}
        status = Status.IDENTICAL if chosen == rejected else Status.KEPT
        excess = max(len(left), len(right)) - self.max_length
        if excess > 0 and status == Status.KEPT:
            in_replies = excess > common_prefix_length(left, right)
            left, right, status = left[excess:], right[excess:], Status.CUT
            if self.overlong == "keep_end" and np.array_equal(left, right):
                status = Status.IDENTICAL_AFTER_CUT
            elif self.overlong == "drop" or in_replies:
                status = Status.OVERLONG
        if status > Status.CUT:
            left, right = left[:0], right[:0]
        prefix = common_prefix_length(left, right)
        return record | {"chosen_ids": left, "rejected_ids": right, "prefix": prefix, "status": status}


def common_prefix_length(left: np.ndarray, right: np.ndarray) -> int:
    """Tokens common to the start of both sides, leaving at least the last token (EOS) of each."""
    shorter = min(len(left), len(right)) - 1
    differs = np.flatnonzero(left[:shorter] != right[:shorter]) if shorter > 0 else []
    return int(differs[0]) if len(differs) else max(shorter, 0)
