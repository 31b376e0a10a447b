"""Where scored rows go: lines added block by block, and a note of how far they reach, from which to go on."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reward_recipes.run import UserError, expect, read_mapping, replacing, save_json
from reward_recipes.score.rows import Answer, block_size


class ScoredRows:
    """The output of a scoring, as one process writes it and all of them read how far it reaches.

    `FILE.progress` stands beside it until it is whole, also if the scoring is interrupted. A Parquet file is made at
    the end, from `FILE.jsonl`. Raises `UserError` where something else was asked before.

    Args:
        path: JSON lines, or Parquet by its suffix; None for standard output. What is no file gets no note.
        asked: what decides the rows' scores; a scoring that is resumed must have been asked the same.
        resume: go on behind the blocks that are there.
    """

    def __init__(self, path: Path | None, asked: dict[str, Any], resume: bool) -> None:
        self._path, self._asked, self._size = path, asked, 0
        self.counts = dict.fromkeys(("rows", "scored", "bad", "left_out"), 0)
        is_file = path and (path.is_file() or not path.exists())  # and not /dev/null, say
        self._note = path.with_name(f"{path.name}.progress") if is_file else None
        self._lines = path.with_name(f"{path.name}.jsonl") if path and path.suffix == ".parquet" else path
        resume = resume and self._note is not None
        self.is_whole = resume and path.is_file() and not self._note.exists()
        if resume and self._note.exists():
            known = read_mapping(self._note)
            for name, value in asked.items():
                before = known["asked"].get(name)
                expect(before == value, name, f"{before!r}, as before", value)
            self.counts, self._size = known["counts"], known["bytes"]
            there = self._lines.stat().st_size if self._lines.is_file() else 0
            expect(there >= self._size, str(self._lines), f"the {self._size} bytes that were written", there)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Begin, or cut off what stands behind the last whole block; by one process, once all have read the note."""
        if self._note is None:
            self._file = open(self._path or sys.stdout.fileno(), "wb", closefd=self._path is not None)
        else:
            self._save_note()
            self._file = self._lines.open("r+b" if self._size else "wb")
            self._file.truncate(self._size)
            self._file.seek(self._size)
        with self._file:
            try:
                yield
            except KeyboardInterrupt:
                if self._note:
                    done = f"interrupted, {self.counts['rows']:,} rows are scored"
                    print(f"{done}; --resume true goes on, another start begins anew", file=sys.stderr)
                raise SystemExit(130) from None  # the shell's status for Ctrl-C

    def _save_note(self) -> None:
        save_json(self._note, {"asked": self._asked, "counts": self.counts, "bytes": self._size})

    def add(self, answers: Sequence[Answer]) -> None:
        """Write answers, and where they are a whole block, note how far the output reaches."""
        for answer in answers:
            if answer.line is not None:
                # JSON's own escape of half a surrogate pair is what `backslashreplace` writes.
                self._file.write(f"{answer.line}\n".encode("utf-8", "backslashreplace"))
            self.counts["bad" if answer.error else "left_out" if answer.line is None else "scored"] += 1
        self.counts["rows"] += len(answers)
        self._file.flush()
        if self._note and len(answers) == block_size():
            os.fsync(self._file.fileno())
            self._size = self._file.tell()
            self._save_note()

    def finish(self) -> None:
        """Say that the output is whole; raises `UserError` for rows that fit no table, whose lines then stay."""
        if self._lines != self._path:
            try:
                _write_table(self._lines, self._path)
            except pa.ArrowException as error:
                expected = "expected columns of one kind each"
                raise UserError(f"{self._path}: {expected}, found: {error}; see {self._lines}") from error
        if self._note:
            self._note.unlink()
        if self._lines != self._path:  # no earlier: without them, a note would promise lines that are gone
            self._lines.unlink()


def _write_table(lines: Path, path: Path) -> None:
    """JSON lines as Parquet, in constant memory: once through for the columns, once to write them."""

    def blocks() -> Iterator[list[dict[str, Any]]]:
        with lines.open(encoding="utf-8") as file:
            while rows := [json.loads(line) for line in islice(file, block_size())]:
                yield rows

    schema = pa.schema([])
    for rows in blocks():
        names = dict.fromkeys(name for row in rows for name in row)
        found = pa.table({name: [row.get(name) for row in rows] for name in names}).schema
        schema = pa.unify_schemas([schema, found], promote_options="permissive")
    with replacing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for rows in blocks():
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
