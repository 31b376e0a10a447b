"""Score a file of texts, line by line in constant memory. `python -m reward_recipes.score`."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from reward_recipes.pairs import Text, as_messages, as_turns, join, parse_json, with_template_values
from reward_recipes.run import UserError, expect, option, parse_arguments, run_cli
from reward_recipes.score.scorer import Scorer, load_scorer

LINES_AT_ONCE = 1024  # enough to sort by length within, little enough to hold
FORMS = "`text`, or `messages`, or `prompt` and `response`, or `prompt` and `responses`"

# What to write back for a line, and the token ids of its texts; a bad line has none, and an `error`.
Line = tuple[dict[str, Any], list[list[int]]]


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
        expect(self.on_error in ("stop", "skip"), "on_error", "`stop` or `skip`", self.on_error)
        source, sink = Path(self.input), Path(self.output)
        expect(self.input == "-" or source.is_file(), "input", "a file that is there, or `-`", self.input)
        expect(self.output == "-" or sink.absolute().parent.is_dir(), "output", "an existing folder", self.output)
        overwrites = self.input != "-" and source.resolve() == sink.resolve()
        expect(not overwrites, "output", "another file than the input", self.output)


def read_line(number: int, raw: str, scorer: Scorer) -> Line:
    """What a line of JSON asks for; a dialogue that the chat template rejects is a bad line like any other."""
    record: dict[str, Any] = {"line": raw.rstrip("\n")}
    try:
        value = parse_json(raw)
        record = value if isinstance(value, dict) else record
        texts = texts_of(value, scorer.tokenizer, scorer.form)
        json.dumps(value, ensure_ascii=False).encode()  # raises for half a surrogate pair, which no tokenizer takes
        return record, scorer.encode(texts)
    except (ValueError, UserError) as error:
        return record | {"error": f"line {number}: {error}"}, []


def texts_of(record: Any, tokenizer: PreTrainedTokenizerBase, form: str | None = None) -> list[Text]:
    """The texts or dialogues that one line asks a reward for.

    Args:
        record: the line.
        tokenizer: of the model.
        form: `messages` for a model that was trained on those: text replies to a text prompt then become messages.

    Raises:
        ValueError: none of the forms that a line may have, or a value of the wrong kind.
    """
    known = record if isinstance(record, dict) else {}
    forms = [name for name in ("text", "messages", "response", "responses") if name in known]
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


def score_stream(scorer: Scorer, source: Iterable[str], sink: TextIO, on_error: str) -> dict[str, int]:
    """Score JSON lines in their order: each gains `reward`, or `rewards` and `best` (the number of the highest).

    A text that is too long for a model trained with `overlong: drop` gets a null and the line `overlong: true`.

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
        taken = lines if on_error == "skip" else [*takewhile(lambda line: line[1], lines)]
        for (record, ids), rewards in zip(taken, scorer.score_ids([ids for _, ids in taken]), strict=True):
            counts["scored" if ids else "bad"] += 1
            sink.write(json.dumps(_rewarded(record, rewards) if ids else record, ensure_ascii=False) + "\n")
        sink.flush()
        if len(taken) < len(lines):
            error = lines[len(taken)][0]["error"]
            raise UserError(f"{error}; the lines before it are scored; mend it, or --on_error skip")
    return counts


def _rewarded(record: dict[str, Any], rewards: list[float | None]) -> dict[str, Any]:
    """A record with its rewards, and without the `overlong` and `error` of an earlier scoring."""
    record = {name: value for name, value in record.items() if name not in ("overlong", "error")}
    if "responses" in record:
        known = [place for place, reward in enumerate(rewards) if reward is not None]
        record |= {"rewards": rewards, "best": max(known, key=lambda place: rewards[place], default=None)}
    else:
        record["reward"] = rewards[0]
    return record | ({"overlong": True} if None in rewards else {})


def main() -> None:
    """Parse, load, stream."""
    args, _ = parse_arguments((ScoreArguments,))
    scorer = load_scorer(args.model_name_or_path, args.dtype, revision=args.revision)
    source = sys.stdin.fileno() if args.input == "-" else args.input
    sink = sys.stdout.fileno() if args.output == "-" else args.output
    with (
        open(source, encoding="utf-8-sig", errors="surrogateescape", closefd=args.input != "-") as lines,
        # JSON's own escape of half a surrogate pair is what `backslashreplace` writes.
        open(sink, "w", encoding="utf-8", errors="backslashreplace", closefd=args.output != "-") as scored,
    ):
        progress = tqdm(lines, desc="scoring", unit=" lines", disable=bool(os.environ.get("CI")) or None)
        counts = score_stream(scorer, progress, scored, args.on_error)
    bad = f", {counts['bad']:,} bad lines passed through with an `error`" if counts["bad"] else ""
    print(f"{counts['scored']:,} lines scored{bad}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
