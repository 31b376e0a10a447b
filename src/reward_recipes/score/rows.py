"""Rows that ask for rewards, in any of their forms: scored block by block, by all processes, answered in order."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from reward_recipes.pairs import (
    TEMPLATE_VALUES,
    Text,
    as_messages,
    as_turns,
    join,
    last_reply,
    parse_json,
    with_template_values,
    without_nulls,
)
from reward_recipes.run import UserError
from reward_recipes.score.scorer import Scorer, by_all_processes

ROWS_AT_ONCE = 1024  # a process: enough to sort by length within, little enough to hold
ASKING = ("text", "messages", "response", "responses")
FORMS = "`text`, or `messages`, or `prompt` and `response`, or `prompt` and `responses`"
NAMES = ("prompt", *ASKING, *TEMPLATE_VALUES)

Row = tuple[str, str | dict[str, Any]]  # where it stands, for an error; and a line of JSON, or what one would hold


class Answer(NamedTuple):
    """What becomes of a row: the line to write, if any, and what is wrong with the row, if anything."""

    line: str | None
    error: str | None = None


@dataclass(frozen=True)
class Asked:
    """What is asked of every row."""

    columns: Mapping[str, str] = field(default_factory=dict)  # the data's names by ours, where they differ
    best_of: bool = False  # write the best of `responses` with its prompt, not the row with its rewards
    skip_bad: bool = False  # pass bad rows through with an `error`, and do not stop there

    def view(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row under our names; where `columns` says what is asked, no other column asks."""
        named = self.columns.keys() & set(ASKING)
        own = {name: value for name, value in row.items() if not (named and name in ASKING)}
        return own | {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}


def texts_of(record: Any, tokenizer: PreTrainedTokenizerBase, form: str | None = None) -> list[Text]:
    """The texts or dialogues that one row asks a reward for; raises `ValueError` where it has none of the `FORMS`.

    For a model whose `form` is `messages`, text replies to a text prompt become messages.
    """
    known = record if isinstance(record, dict) else {}
    forms = [name for name in ASKING if name in known]
    if len(forms) != 1 or (forms[0].startswith("response") and "prompt" not in known):
        raise ValueError(f"expected a JSON object with {FORMS}, found {record!r:.60}")
    name, value = forms[0], record[forms[0]]
    replies = value if name == "responses" else [value]
    if not isinstance(replies, list) or not replies:
        raise ValueError(f"expected a list of replies in 'responses', found {value!r:.60}")
    texts = [_checked(reply, name) for reply in replies]
    if name.startswith("response"):
        prompt = _checked(record["prompt"], "prompt")
        texts = join(as_turns(tokenizer, prompt) if form == "messages" else prompt, texts)
    return [with_template_values(text, record) for text in texts]


def _checked(value: Any, name: str) -> Text:
    messages = as_messages(value)  # which may stand in text, as in pairs
    if messages or isinstance(value, str):
        return messages or value
    raise ValueError(f"expected text, or messages with `role` and `content`, in {name!r}, found {value!r:.60}")


def block_size() -> int:
    """How many rows all processes score at once."""
    return ROWS_AT_ONCE * PartialState().num_processes


def score_rows(scorer: Scorer, rows: Iterable[Row], asked: Asked, done: int = 0) -> Iterator[list[Answer]]:
    """Answer rows in their order, block by block: each gains `reward`, or `rewards` and `best` (the highest one).

    A text that is too long for a model trained with `overlong: drop` gets a null and the row `overlong: true`. Each
    process has all rows, and scores its part of a block. Blocks are cut from the first row on, so that rows score the
    same, bit for bit, whether or not `done` ones are left out.

    Raises:
        UserError: a bad row, after the answers to all before it, unless bad rows are skipped.
    """
    rest = islice(rows, done, None)
    while block := list(islice(rest, block_size())):
        answers = by_all_processes(block, partial(_answers, scorer, asked))
        sound = answers if asked.skip_bad else [*takewhile(lambda answer: not answer.error, answers)]
        yield sound
        if len(sound) < len(answers):
            error = answers[len(sound)].error
            raise UserError(f"{error}; the lines before it are scored; mend it, or --on_error skip")


def _answers(scorer: Scorer, asked: Asked, rows: Sequence[Row]) -> list[Answer]:
    read = [_read(*row, scorer, asked) for row in rows]
    try:  # all at once, which takes half the time
        found = iter(scorer.encode([text for _, texts in read for text in texts]))
        groups = [list(islice(found, len(texts))) for _, texts in read]
    except UserError:  # a dialogue that the chat template rejects: a bad row like any other
        groups = [_encoded(place, *row, scorer) for (place, _), row in zip(rows, read, strict=True)]
    scores = scorer.score_ids(groups)
    return [_answer(record, rewards, asked) for (record, _), rewards in zip(read, scores, strict=True)]


def _encoded(place: str, record: dict[str, Any], texts: list[Text], scorer: Scorer) -> list[list[int]]:
    try:
        return scorer.encode(texts)
    except UserError as error:
        record["error"] = f"{place}: {error}"
        return []


def _read(place: str, value: Any, scorer: Scorer, asked: Asked) -> tuple[dict[str, Any], list[Text]]:
    """A row and its texts; a bad one has none, and an `error`."""
    record: dict[str, Any] = {"line": value.rstrip("\n")} if isinstance(value, str) else without_nulls(value)
    try:
        value = parse_json(value) if isinstance(value, str) else record
        record = value if isinstance(value, dict) else record
        view = asked.view(value) if isinstance(value, dict) else value
        texts = texts_of(view, scorer.tokenizer, scorer.form)
        if asked.best_of and "responses" not in view:
            raise ValueError("expected `prompt` and `responses`, of which to write the best, found another form")
        _written(value).encode()  # raises for half a surrogate pair, which no tokenizer takes
        return record, texts
    except (ValueError, UserError) as error:
        return record | {"error": f"{place}: {error}"}, []


def _answer(record: dict[str, Any], rewards: list[float | None], asked: Asked) -> Answer:
    """A record with its rewards and without the `overlong` and `error` of an earlier scoring, or its best reply."""
    if not rewards:
        return Answer(None if asked.best_of else _written(record), record["error"])
    view = asked.view(record)
    record = {name: value for name, value in record.items() if name not in ("overlong", "error")}
    if "responses" not in view:
        record["reward"] = rewards[0]
    else:
        known = [place for place, reward in enumerate(rewards) if reward is not None]
        best = max(known, key=lambda place: rewards[place], default=None)
        if asked.best_of:
            return Answer(None if best is None else _written(_best(view, best) | {"reward": rewards[best]}))
        record |= {"rewards": rewards, "best": best}
    return Answer(_written(record | ({"overlong": True} if None in rewards else {})))


def _best(row: Mapping[str, Any], best: int) -> dict[str, Any]:
    """The best reply as TRL's SFT reads it: a `prompt` and its `completion`, as text or both as messages."""
    prompt = _checked(row["prompt"], "prompt")
    whole = join(prompt, [_checked(reply, "responses") for reply in row["responses"]])[best]  # together, as scored
    if isinstance(whole, str):
        if not whole.startswith(prompt):  # the reply holds it, with other white space or as a turn
            prompt = whole.rstrip().removesuffix(last_reply(prompt, whole)).rstrip()
        return {"prompt": prompt, "completion": whole.removeprefix(prompt)}
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    end = len(turns) if whole[: len(turns)] == turns else len(whole) - 1
    given = {name: row[name] for name in TEMPLATE_VALUES if name in row}
    return {"prompt": whole[:end], "completion": whole[end:], **given}


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # a date, say, which a table may hold
