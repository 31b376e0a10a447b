"""A CSV file to which rows are appended whole or not at all, for a reader at any moment and on a full disk."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from reward_recipes.run.files import replacing


class CSVFile:
    """Starts a file with its header and rows, in place of one that is there.

    Args:
        path: of the file.
        columns: in their order; a row may lack some.
        rows: the first ones.

    Raises:
        OSError: it cannot be written.
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
