"""JSON as all readers read it alike: what keeps a file from being rows of pairs, and in which line."""

import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

TEXTS = ("prompt", "chosen", "rejected")


def parse_json(text: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: no JSON, a key twice in one object, or nesting too deep to follow.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _each_once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"expected each key once, found {twice!r} twice")
    return found


def first_problem(file: Path) -> str | None:
    """Where and why a `.json` or `.jsonl` file, zipped or not, is not rows; None if nothing is wrong.

    Arrow's reader dies of a file of nulls, and `datasets` makes text of numbers and objects without a word.
    """
    try:
        return next((f"{file}, {problem}" for problem in _problems(file)), None)
    except (OSError, EOFError, zlib.error) as error:
        return f"{file}: {error}"


def _problems(file: Path) -> Iterator[str]:
    if file.suffix in (".zst", ".xz", ".bz2"):
        yield f"expected a plain file or .gz, found {file.suffix}; unpack it"
        return
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as stream:
        if ".json" not in file.suffixes and stream.peek(1)[:1] != b"[":
            yield from _of_lines(stream)
            return
        try:
            value = _strict(stream.read().removeprefix(BOM_UTF8))
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                yield f"line {error.lineno}: expected JSON, found {error.msg}"
            else:  # after the first line's value: rows, one a line
                stream.seek(0)
                yield from _of_lines(stream)
        except ValueError as error:
            yield f"line 1 or later: expected JSON, found what cannot be read: {error}"
        else:
            complaints = map(_complaint, value if isinstance(value, list) else [value])
            yield from (f"row {row}: {complaint}" for row, complaint in enumerate(complaints) if complaint)


def _of_lines(stream: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        try:
            complaint = (
                _complaint(_strict(line.removeprefix(BOM_UTF8) if number == 1 else line)) if line.strip() else ""
            )
        except ValueError as error:
            complaint = f"expected one JSON object, found {line[:40]!r} ({error})"
        if complaint:
            yield f"line {number}: {complaint}"


def _strict(content: bytes) -> Any:
    value = parse_json(content.decode())
    if b"\\u" in content:
        json.dumps(value, ensure_ascii=False).encode()  # raises for half a surrogate pair, which is no text
    return value


def _complaint(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    for column in TEXTS:
        if not isinstance(row.get(column), (str, list, NoneType)):
            return f"expected text or messages in {column!r}, found {row[column]!r:.60}"
    return None
