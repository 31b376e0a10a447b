"""How files are read and written whole: a reader, or a run that was killed, finds the old one or the new one."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from reward_recipes.run.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to, which takes its place at the end; nothing is left of a failed attempt."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a link that stands there would have its target overwritten
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half a file."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


class CSVFile:
    """A CSV file with a header, in place of one that is there, to which rows are added whole or not at all.

    A row may lack some of the columns. Raises `OSError` if it cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
        self.path, self._columns = path, columns
        text = self._lines([dict(zip(columns, columns, strict=True)), *rows])
        with replacing(path) as partial:
            partial.write_bytes(text)
        self._size = len(text)  # bytes that are whole rows

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; raises `OSError`, with the file as it was, if they cannot all be written."""
        text = self._lines(rows)
        try:
            with self.path.open("r+b") as file:
                file.seek(self._size)
                file.write(text)
                file.truncate()
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, self._size)
            raise
        self._size += len(text)

    def _lines(self, rows: Iterable[Mapping[str, Any]]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self._columns).writerows(rows)
        return text.getvalue().encode()


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]!r} twice")
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file, or one whose name ends in .json, holds. Raises `UserError` where it holds none."""
    try:
        text = path.read_text("utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, _EachKeyOnce)
    except OSError as error:
        raise UserError(f"expected a file at {path}, found: {error.strerror}; give one that can be read") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: expected a mapping, found: {' '.join(str(error).split())}; mend it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, found {type(content).__name__}; mend it")
    return content
