"""Rows of files, each with its place: JSON (a row a line, or one document), CSV, TSV, Parquet, Arrow, zipped or not."""

import csv
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import PurePath
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from reward_recipes.run import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
Rows = Iterator[tuple[str, dict[str, Any]]]
# What readers raise for a file that is damaged, or cut off within.
DAMAGE = (OSError, EOFError, ValueError, csv.Error, zlib.error, pa.ArrowException, NotImplementedError)


def kind_of(name: str) -> str | None:
    """The suffix that says how to read a file; None for a file that is not read."""
    return next((suffix for suffix in map(str.lower, PurePath(name).suffixes) if suffix in SUFFIXES), None)


def rows_of(name: str, path: str, wanted: Iterable[str], unread: set[str]) -> Rows:
    """Read a file row by row: the place ("FILE, line 3"), and the columns of that row.

    Args:
        name: as the user knows the file; its suffixes say how to read it.
        path: where it lies on this machine.
        wanted: columns to read; a table's others are not touched, and cannot break it.
        unread: gets the names of the other columns.

    Raises:
        UserError: a file that is damaged or no such rows; it names the place.
    """
    kind, wanted = kind_of(name), set(wanted)
    try:
        if kind in (".parquet", ".arrow"):
            for number, row in enumerate(_table(path, kind, wanted, unread)):
                yield f"{name}, row {number}", row
            return
        # The suffix of the name, since a download's own path may have none.
        compression = fsspec.utils.infer_compression(name.lower())
        with fsspec.open(path, "rb", compression=compression) as file, closing(io.BufferedReader(file)) as stream:
            rows = _csv(stream, SEPARATORS[kind]) if kind in SEPARATORS else _json(stream, kind == ".json")
            for where, row in rows:
                unread.update(row.keys() - wanted)
                yield f"{name}, {where}", row
    except DAMAGE as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"unreadable data: {name}, {found}; mend or remove it") from error


def parse_json(text: str) -> Any:
    """Read JSON; raises ValueError for none, a name twice in one object, or nesting too deep to follow."""
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_value(value: Any, kind: type, name: str) -> Any:
    """A value of a kind, which may stand as JSON in text; raises ValueError, with the name, for another."""
    found = parse_json(value) if isinstance(value, str) else value
    if not isinstance(found, kind):
        raise ValueError(f"expected a {kind.__name__} in {name!r}, found {value!r:.60}")
    return found


def _each_once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"expected each name once, found {twice!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)  # made once: to make it takes as long as to read a row


def _json(stream: BinaryIO, document: bool) -> Rows:
    """Lines, or one document where the file's name or its first byte says so."""
    if not document and stream.peek(1)[:1] != b"[":
        yield from _lines(stream)
        return
    content = stream.read()
    try:
        value = parse_json(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ValueError(f"line {error.lineno}: expected JSON, found {error.msg}") from error
        yield from _lines(io.BytesIO(content))  # after the first line's value: rows, one a line
        return
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        yield f"row {number}", _object(row, f"row {number}")


def _lines(stream: Iterable[bytes]) -> Rows:
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        try:
            value = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            raise ValueError(f"line {number}: expected one JSON object, found {line[:40]!r} ({error})") from error
        yield f"line {number}", _object(value, f"line {number}")


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected a JSON object, found {type(value).__name__}")
    return value


def _csv(stream: BinaryIO, separator: str) -> Rows:
    """Text stays text, `NA` and `null` too."""
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=separator, strict=True)
        try:
            _each_once([(name, None) for name in reader.fieldnames or [] if name])
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{place}: expected {len(reader.fieldnames)} cells, found another number")
                yield place, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"after line {reader.line_num}: {error}") from error


def _table(path: str, kind: str, wanted: set[str], unread: set[str]) -> Iterator[dict[str, Any]]:
    if kind == ".parquet":
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    else:
        source = pa.memory_map(path)
        is_file = source.read_at(6, 0) == b"ARROW1"  # else a stream, as `datasets` writes it
        table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
        schema = table.schema
    columns = [name for name in schema.names if name in wanted]
    unread.update(set(schema.names) - wanted)
    features = Features.from_arrow_schema(schema.empty_table().select(columns).schema)
    labels = {name: kind.names for name, kind in features.items() if isinstance(kind, ClassLabel)}
    parts = file.iter_batches(1000, columns=columns) if kind == ".parquet" else table.select(columns).to_batches(1000)
    for batch in parts:
        batch.validate(full=True)  # Arrow lets bytes through that are not UTF-8
        for row in batch.to_pylist():
            for name, names in labels.items():
                row[name] = None if row[name] is None else names[row[name]]
            yield {name: without_nulls(value) for name, value in row.items()}


def without_nulls(value: Any) -> Any:
    """Arrow fills missing keys with nulls, which go; `content: null` is valid and stays."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return value
