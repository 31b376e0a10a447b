"""Score texts in constant memory, by as many processes as are launched. `python -m reward_recipes.score`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reward_recipes.pairs import load_rows, read_columns
from reward_recipes.run import expect, join_processes, option, parse_arguments, run_cli
from reward_recipes.score.output import ScoredRows
from reward_recipes.score.rows import FORMS, NAMES, Asked, Row, score_rows
from reward_recipes.score.scorer import load_scorer

# A scoring that is resumed must be asked the same.
DECISIVE = ("model_name_or_path", "revision", "dtype", "columns", "best_of")
DECISIVE += ("input", "dataset_name", "dataset_config", "dataset_split")


@dataclass
class ScoreArguments:
    """What to score, and with which model."""

    model_name_or_path: str = option("", "A run's output_dir, its adapter, or a hub id.")
    input: str = option("", f"JSON lines that hold {FORMS}; `-` is standard input.")
    dataset_name: str = option("", "In place of input: a data set with such columns, by hub id, folder or file.")
    dataset_config: str | None = option(None, "Configuration of the dataset.")
    dataset_split: str = option("train", "Split to score; a single file is one split, train.")
    columns: dict[str, Any] | str | None = option(None, "Other column names: '{response: answer}' reads `answer`.")
    output: str = option("-", "The rows with their rewards, as JSON lines or `.parquet`; `-` is standard output.")
    best_of: bool = option(False, "Write the best of `responses` with its prompt, ready for fine-tuning (SFT).")
    resume: bool = option(False, "Go on with a scoring that was killed.")
    dtype: str = option("float32", "Precision of the weights: float32, bfloat16 or float16; scores are float32.")
    on_error: str = option("stop", "At a bad line: `stop`, or `skip` it with an `error`.")
    revision: str = option("main", "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        expect(self.on_error in ("stop", "skip"), "on_error", "`stop` or `skip`", self.on_error)
        self.columns = read_columns(self.columns, NAMES)
        expect(not (self.input and self.dataset_name), "input", "none beside dataset_name", self.input)
        source, sink = Path(self.input or self.dataset_name), Path(self.output)
        if self.input and source.suffix in (".parquet", ".arrow", ".csv", ".tsv"):
            self.dataset_name, self.input = self.input, ""
        is_there = self.dataset_name or self.input == "-" or source.is_file()
        expect(bool(is_there), "input", "a file that is there, or `-`", self.input)
        expect(self.output == "-" or sink.absolute().parent.is_dir(), "output", "an existing folder", self.output)
        overwrites = self.input != "-" and sink.is_file() and source.resolve() == sink.resolve()
        expect(not overwrites, "output", "another file than the input", self.output)
        expect(not self.resume or "-" not in (self.input, self.output), "resume", "files as input and output", "`-`")


@contextmanager
def open_rows(args: ScoreArguments, count: bool) -> Iterator[tuple[Iterator[Row], int | None]]:
    """The rows to score, each with its place, and how many they are if that is asked and can be known."""
    if args.dataset_name:
        rows = load_rows(args.dataset_name, args.dataset_config, args.dataset_split)
        yield ((f"row {number}", row) for number, row in enumerate(rows)), len(rows)
        return
    source = sys.stdin.fileno() if args.input == "-" else args.input
    with open(source, encoding="utf-8-sig", errors="surrogateescape", closefd=args.input != "-") as file:
        total = sum(not line.isspace() for line in file) if count and file.seekable() else None
        if total is not None:
            file.seek(0)
        yield ((f"line {number}", line) for number, line in enumerate(file, start=1) if line.strip()), total


def main() -> None:
    """Parse, load, score block by block."""
    args, _ = parse_arguments((ScoreArguments,), page="score")
    state = join_processes()
    expect(args.input != "-" or state.num_processes == 1, "input", "a file, for several processes to read", "`-`")
    decisive = {name: getattr(args, name) for name in DECISIVE}
    output = ScoredRows(None if args.output == "-" else Path(args.output), decisive, args.resume)
    if output.is_whole:
        state.print(f"{args.output} is whole: nothing to resume", file=sys.stderr)
        return
    scorer = load_scorer(args.model_name_or_path, args.dtype, revision=args.revision)
    state.print(f"{args.model_name_or_path}: {scorer.convention}", file=sys.stderr)
    state.wait_for_everyone()  # all have read how far the output reaches
    on_terminal = state.is_main_process and sys.stderr.isatty()
    writing = output.opened() if state.is_main_process else nullcontext()
    with open_rows(args, count=on_terminal) as (rows, total), writing:
        done = output.counts["rows"]
        progress = tqdm(total=total, initial=done, desc="scoring", unit=" rows", disable=not on_terminal)
        asked = Asked(args.columns or {}, args.best_of, args.on_error == "skip")
        for answers in score_rows(scorer, rows, asked, done):
            if state.is_main_process:
                output.add(answers)
                progress.update(len(answers))
    if not state.is_main_process:
        return
    progress.close()
    output.finish()
    bad, left_out = output.counts["bad"], output.counts["left_out"]
    kept = "left out" if args.best_of else "passed through with an `error`"
    more = f", {bad:,} bad lines {kept}" if bad else ""
    more += f", {left_out:,} prompts left out: no reply could be scored" if left_out else ""
    print(f"{output.counts['scored']:,} lines scored{more}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
