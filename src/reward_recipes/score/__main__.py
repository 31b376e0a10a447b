"""Score a file of texts, line by line in constant memory. `python -m reward_recipes.score`."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from reward_recipes.pairs import Dialogue, Text, as_messages, join, parse_json, parse_value
from reward_recipes.run import UserError, expect, option, parse_arguments, run_cli
from reward_recipes.score.scorer import Scorer, load_scorer

LINES_AT_ONCE = 1024  # enough to sort by length within, little enough to hold
FORMS = "`text`, or `messages`, or `prompt` and `response`, or `prompt` and `responses`"
KINDS = {"text": (str, "text"), "messages": (list, "messages")}  # other keys may hold either


@dataclass
class ScoreArguments:
    """What to score, and with which model."""

    model_name_or_path: str = option("", "A run's output_dir, its adapter, or a hub id.")
    input: str = option("", f"JSON lines that hold {FORMS}; `-` is standard input.")
    output: str = option("-", "The same lines with their rewards; `-` is standard output.")
    dtype: str = option("float32", "Of the weights: float32, bfloat16 or float16.")
    on_error: str = option("stop", "At a bad line: `stop`, or `skip` it with an `error`.")
    revision: str = option("main", "Of a model on the Hub.")

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "input"):
            expect(bool(getattr(self, name)), name, f"a value (--{name})", "")
        expect(self.on_error in ("stop", "skip"), "on_error", "`stop` or `skip`", self.on_error)
        source, sink = Path(self.input), Path(self.output)
        expect(self.input == "-" or source.is_file(), "input", "a file that is there, or `-`", self.input)
        expect(self.output == "-" or sink.absolute().parent.is_dir(), "output", "an existing folder", self.output)
        overwrites = self.input != "-" and source.resolve() == sink.resolve()
        expect(not overwrites, "output", "another file than the input", self.output)


@dataclass
class Line:
    """A line of the input: its number, the record to write back, the texts to score, or what is wrong with it."""

    number: int
    record: dict[str, Any]
    texts: list[Text] = field(default_factory=list)
    error: str | None = None


def read_line(number: int, raw: str, scorer: Scorer) -> Line:
    """What a line of JSON asks for; a dialogue that the chat template rejects is a bad line like any other."""
    line = Line(number, record={"line": raw.rstrip("\n")})
    try:
        value = parse_json(raw)
        if isinstance(value, dict) and value:
            line.record = value
        line.texts = texts_of(value, scorer.form)
        scorer.encode([text for text in line.texts if not isinstance(text, str)])
    except (ValueError, UserError) as error:
        line.error = str(error)
    return line


def texts_of(record: Any, form: str | None = None) -> list[Text]:
    """The texts or dialogues that one line asks a reward for.

    Args:
        record: the line.
        form: `messages` for a model that was trained on those: text replies to a text prompt then become messages.

    Raises:
        ValueError: none of the forms that a line may have, or a value of the wrong kind.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object with {FORMS}, found {type(record).__name__}")
    forms = [name for name in ("text", "messages", "response", "responses") if name in record]
    if len(forms) != 1 or (forms[0].startswith("response") and "prompt" not in record):
        raise ValueError(f"expected {FORMS}, found {sorted(record)}")
    name, value = forms[0], record[forms[0]]
    replies = value if name == "responses" else [value]
    if not isinstance(replies, list) or not replies:
        raise ValueError(f"expected a list of replies in 'responses', found {value!r:.60}")
    texts = [_checked(reply, name) for reply in replies]
    if name.startswith("response"):
        prompt = _checked(record["prompt"], "prompt")
        if form == "messages" and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        texts = [join(prompt, reply) for reply in texts]
    kinds = {"tools": list, "chat_template_kwargs": dict}
    extra = [parse_value(record[name], kind, name) if record.get(name) else None for name, kind in kinds.items()]
    return [text if isinstance(text, str) else Dialogue(text, *extra) for text in texts]


def _checked(value: Any, name: str) -> Text:
    kind, expected = KINDS.get(name, ((str, list), "text or messages"))
    if not isinstance(value, kind) or value == []:
        raise ValueError(f"expected {expected} in {name!r}, found {value!r:.60}")
    if isinstance(value, list):
        as_messages(value)
    json.dumps(value, ensure_ascii=False).encode()  # raises for half a surrogate pair, which no tokenizer takes
    return value


def score_lines(scorer: Scorer, lines: list[Line]) -> None:
    """Add `reward`, or `rewards` and `best` (the number of the highest), to the record of each line.

    A text that is too long for a model trained with `overlong: drop` gets a null and the line `overlong: true`.
    """
    for line, rewards in zip(lines, scorer.score_groups([line.texts for line in lines]), strict=True):
        for name in ("reward", "rewards", "best", "overlong", "error"):  # what an earlier scoring left
            line.record.pop(name, None)
        if "responses" in line.record:
            known = [place for place, reward in enumerate(rewards) if reward is not None]
            line.record["rewards"] = rewards
            line.record["best"] = max(known, key=lambda place: rewards[place], default=None)
        else:
            line.record["reward"] = rewards[0]
        if None in rewards:
            line.record["overlong"] = True


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
    while lines := [read_line(number, raw, scorer) for number, raw in islice(numbered, LINES_AT_ONCE)]:
        bad = next((line for line in lines if line.error), None)
        if bad and on_error == "stop":
            lines = lines[: lines.index(bad)]
        score_lines(scorer, [line for line in lines if not line.error])
        for line in lines:
            if line.error:
                line.record["error"] = f"line {line.number}: {line.error}"
            counts["bad" if line.error else "scored"] += 1
            sink.write(json.dumps(line.record, ensure_ascii=False) + "\n")
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
    source = sys.stdin.fileno() if args.input == "-" else args.input
    sink = sys.stdout.fileno() if args.output == "-" else args.output
    with (
        open(source, encoding="utf-8-sig", errors="surrogateescape", closefd=args.input != "-") as lines,
        # JSON's own escape of half a surrogate pair is what `backslashreplace` writes.
        open(sink, "w", encoding="utf-8", errors="backslashreplace", closefd=args.output != "-") as scored,
    ):
        progress = tqdm(lines, desc="scoring", unit=" lines", disable=bool(os.environ.get("CI")))
        try:
            counts = score_stream(scorer, progress, scored, args.on_error)
        except BrokenPipeError:  # the reader, `head` say, has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
    bad = f", {counts['bad']:,} bad lines passed through with an `error`" if counts["bad"] else ""
    print(f"{counts['scored']:,} lines scored{bad}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
