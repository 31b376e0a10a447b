"""Score a file of texts, line by line in constant memory. `python -m reward_recipes.score`."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from reward_recipes.pairs import join, parse_json
from reward_recipes.run import UserError, parse_arguments, run_cli
from reward_recipes.score.scorer import Scorer, Text, load_scorer

LINES_AT_ONCE = 1024  # enough to sort by length within, little enough to hold
FORMS = "`text`, or `messages`, or `prompt` and `response`, or `prompt` and `responses`"


@dataclass
class ScoreArguments:
    """What to score, and with which model."""

    model_name_or_path: str = field(default="", metadata={"help": "A run's output_dir, its adapter, or a hub id."})
    input: str = field(default="", metadata={"help": f"JSON lines that hold {FORMS}; `-` is standard input."})
    output: str = field(default="-", metadata={"help": "The same lines with their rewards; `-` is standard output."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or float16."})
    on_error: str = field(default="stop", metadata={"help": "At a bad line: `stop`, or `skip` it with an `error`."})
    revision: str = field(default="main", metadata={"help": "Of a model on the Hub."})

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "input"):
            if not getattr(self, name):
                raise UserError(f"{name}: expected a value, found none; add --{name}")
        if self.on_error not in ("stop", "skip"):
            raise UserError(f"on_error: expected `stop` or `skip`, found {self.on_error!r}")
        if self.input != "-" and not Path(self.input).is_file():
            raise UserError(f"input: expected a file or `-`, found nothing at {self.input}")
        if self.output != "-" and not Path(self.output).absolute().parent.is_dir():
            raise UserError(f"output: expected a file in an existing folder, found none at {self.output}")
        if self.input != "-" and Path(self.input).resolve() == Path(self.output).resolve():
            raise UserError(f"output: expected another file than the input, found {self.output} twice")


class Line:
    """A line of the input: what it holds, the texts to score, or what is wrong with it."""

    def __init__(self, number: int, raw: str) -> None:
        self.number, self.record, self.error = number, {}, None
        self.texts: list[Text] = []
        try:
            self.record = parse_json(raw)
            self.texts = texts_of(self.record)
        except ValueError as error:
            self.error = str(error)
            if not isinstance(self.record, dict) or not self.record:
                self.record = {"line": raw.rstrip("\n")}


def texts_of(record: Any) -> list[Text]:
    """The texts or dialogues that one line asks a reward for.

    Raises:
        ValueError: none of the forms that a line may have, or a value of the wrong kind.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object with {FORMS}, found {type(record).__name__}")
    forms = [name for name in ("text", "messages", "response", "responses") if name in record]
    if len(forms) != 1 or (forms[0].startswith("response") and "prompt" not in record):
        raise ValueError(f"expected {FORMS}, found {sorted(record)}")
    value, prompt = record[forms[0]], record.get("prompt")
    if forms[0] in ("text", "messages"):
        return [_checked(value, forms[0], str if forms[0] == "text" else list)]
    replies = value if forms[0] == "responses" else [value]
    if not isinstance(replies, list) or not replies:
        raise ValueError(f"expected a list of replies in 'responses', found {value!r:.60}")
    prompt = _checked(prompt, "prompt", (str, list))
    return [_join(prompt, _checked(reply, forms[0], (str, list))) for reply in replies]


def _join(prompt: Text, reply: Text) -> Text:
    if isinstance(prompt, list) and isinstance(reply, str):
        reply = [{"role": "assistant", "content": reply}]
    return join(prompt, reply)


def _checked(value: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or value == []:
        expected = {str: "text", list: "messages"}.get(kind, "text or messages")
        raise ValueError(f"expected {expected} in {name!r}, found {value!r:.60}")
    for text in [value] if isinstance(value, str) else [_turn(message, name) for message in value]:
        text.encode()  # raises for half a surrogate pair, which no tokenizer takes
    return value


def _turn(message: Any, name: str) -> str:
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise ValueError(f"expected messages with `role` and `content` in {name!r}, found {message!r:.60}")
    return message["role"] + message["content"]


def score_lines(scorer: Scorer, lines: list[Line]) -> None:
    """Add `reward`, or `rewards` and `best` (the number of the highest), to the record of each good line.

    A text that is too long for a model trained with `overlong: drop` gets a null and the line `overlong: true`.
    """
    good = [line for line in lines if not line.error]
    for line in good:  # what an earlier scoring left
        for name in ("reward", "rewards", "best", "overlong", "error"):
            line.record.pop(name, None)
    for line, rewards in zip(good, scorer.score_groups([line.texts for line in good]), strict=True):
        if "responses" in line.record:
            known = [place for place, reward in enumerate(rewards) if reward is not None]
            line.record["rewards"] = rewards
            line.record["best"] = max(known, key=lambda place: rewards[place], default=None)
        else:
            line.record["reward"] = rewards[0]
        if None in rewards:
            line.record["overlong"] = True


def _try_template(scorer: Scorer, line: Line) -> None:
    """A dialogue that the chat template rejects is a bad line, not the end of the file."""
    if not line.error and any(isinstance(text, list) for text in line.texts):
        try:
            scorer.encode(line.texts)
        except UserError as error:
            line.error = str(error)


def score_stream(scorer: Scorer, source: Iterator[str], sink: TextIO, on_error: str) -> dict[str, int]:
    """Score JSON lines in their order.

    Args:
        source: lines; blank ones are passed over.
        sink: where to write.
        on_error: `stop` at the first bad line, after all before it were written, or `skip` it with an `error`.

    Returns:
        How many lines were scored and how many were bad.

    Raises:
        UserError: a bad line under `stop`.
    """
    counts = {"scored": 0, "bad": 0}
    numbered = ((number, raw) for number, raw in enumerate(source, start=1) if raw.strip())
    while part := [Line(number, raw) for number, raw in islice(numbered, LINES_AT_ONCE)]:
        for line in part:
            _try_template(scorer, line)
        bad = next((line for line in part if line.error), None)
        if bad and on_error == "stop":
            part = part[: part.index(bad)]
        score_lines(scorer, part)
        for line in part:
            counts["bad" if line.error else "scored"] += 1
            record = line.record | {"error": f"line {line.number}: {line.error}"} if line.error else line.record
            sink.write(json.dumps(record, ensure_ascii=False) + "\n")
        sink.flush()
        if bad and on_error == "stop":
            raise UserError(
                f"line {bad.number}: {bad.error}; the lines before it are scored; mend it, or --on_error skip"
            )
    return counts


def main() -> None:
    """Parse, load, stream."""
    (args,) = parse_arguments((ScoreArguments,))
    transformers_logging.disable_progress_bar()
    scorer = load_scorer(args.model_name_or_path, args.dtype, revision=args.revision)
    with ExitStack() as stack:
        # JSON's own escape of half a surrogate pair is what `backslashreplace` writes.
        source, sink = sys.stdin, sys.stdout
        if args.input == "-":
            source.reconfigure(encoding="utf-8", errors="surrogateescape")
        else:
            source = stack.enter_context(open(args.input, encoding="utf-8-sig", errors="surrogateescape"))
        if args.output == "-":
            sink.reconfigure(encoding="utf-8", errors="backslashreplace")
        else:
            sink = stack.enter_context(open(args.output, "w", encoding="utf-8", errors="backslashreplace"))
        lines = tqdm(source, desc="scoring", unit=" lines", disable=bool(os.environ.get("CI")))
        try:
            counts = score_stream(scorer, lines, sink, args.on_error)
        except BrokenPipeError:  # the reader, `head` say, has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
    bad = f", {counts['bad']:,} bad lines passed through with an `error`" if counts["bad"] else ""
    print(f"{counts['scored']:,} lines scored{bad}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
