"""Where preference pairs come from, and what makes a source unreadable."""

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_dataset

from reward_recipes.errors import UserError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TEXTS = ("prompt", "chosen", "rejected")
COLUMNS = (*TEXTS, "margin", "subset")
LARGEST_MARGIN = 3e38  # of float32

# How `datasets` puts it that a file holds no rows.
EMPTY = ("StopIteration", "corresponds to no data", "BatchSize must be greater than 0")


def load_pairs(name: str, config_name: str | None = None, data_dirs: list[str] | None = None) -> DatasetDict:
    """Load preference pairs from a hub id, a local folder, or a jsonl or parquet file (which becomes split `train`).

    Args:
        name: hub id or path.
        config_name: configuration of the dataset, as in `datasets.load_dataset(name, config_name)`.
        data_dirs: folders inside the dataset; each is loaded on its own and its name fills the column `subset`.

    Returns:
        Every split of the source, with such columns as it has; `checked_pairs` takes one of them further.

    Raises:
        UserError: nothing there, a broken file (named with its line), or folders whose columns differ.
    """
    path = Path(name).expanduser()
    for option, value in (("dataset_config", config_name), ("dataset_data_dirs", data_dirs)):
        if value and path.is_file():
            raise UserError(f"{option}={value!r} would have no effect on the single file {path}; remove it")
    if data_dirs is None:
        return _load(name, config_name)
    parts = {folder: _load(name, config_name, data_dir=folder) for folder in data_dirs}
    splits = {split: None for part in parts.values() for split in part}
    return DatasetDict({split: _joined(parts, split, name) for split in splits})


def checked_pairs(dataset: Dataset, where: str) -> Dataset:
    """Hold a split to what pairs must be.

    Args:
        dataset: one split of what `load_pairs` returns.
        where: how to call it in an error.

    Returns:
        The columns `chosen` and `rejected` (text or messages) and, where the source has them, `prompt`, `margin` and
        `subset`.

    Raises:
        UserError: missing columns, no rows, text that is not text, or a margin that is not a number.
    """
    missing = {"chosen", "rejected"} - set(dataset.column_names)
    if missing:
        raise UserError(
            f"{where}: expected columns 'chosen' and 'rejected', found {sorted(dataset.column_names)}; rename them"
        )
    if len(dataset) == 0:
        raise UserError(f"{where}: expected preference pairs, found no rows")
    dataset = dataset.select_columns([column for column in COLUMNS if column in dataset.column_names])
    kinds = {column: _kind(dataset, column, where) for column in TEXTS if column in dataset.column_names}
    if {"text", "messages"} <= {kinds["chosen"], kinds["rejected"]}:
        raise UserError(f"{where}: expected 'chosen' and 'rejected' alike, found {kinds}; make both text or messages")
    if kinds.get("prompt") == "messages" and "text" in kinds.values():
        raise UserError(f"{where}: expected a prompt like the replies, found {kinds}; make them all text or messages")
    if "subset" in dataset.column_names and not isinstance(dataset.features["subset"], (Value, ClassLabel)):
        raise UserError(f"{where}: expected a name in 'subset', found {dataset[0]['subset']!r:.60}")
    if "margin" in dataset.column_names:
        _check_margin(dataset["margin"], where)
    return dataset


def is_conversational(features: Features) -> bool:
    """Whether checked pairs are lists of messages (`role`, `content`) rather than plain text."""
    return not isinstance(features["chosen"], Value)


def _load(name: str, config_name: str | None, data_dir: str | None = None) -> DatasetDict:
    path = Path(name).expanduser()
    builder = _builder(path) if path.is_file() else None
    try:
        with _quiet():
            if builder:
                splits = load_dataset(builder, data_files={"train": str(path)})
            else:
                splits = load_dataset(str(path) if path.is_dir() else name, config_name, data_dir=data_dir)
        for split in splits.values():
            split.data.validate(full=True)  # Arrow's JSON reader lets bytes through that are not UTF-8
        return splits
    except Exception as error:  # `datasets` passes on whatever its readers raise
        raise UserError(_explain(name, data_dir, error)) from error


def _builder(path: Path) -> str:
    for suffix in path.suffixes:
        if suffix.lower() in BUILDERS:
            return BUILDERS[suffix.lower()]
    raise UserError(f"{path}: expected a file ending in {', '.join(BUILDERS)}, found {path.name!r}; convert it")


@contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` logs an unreadable file before it raises; the user is told once, by us."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def _explain(name: str, data_dir: str | None, error: BaseException) -> str:
    where = Path(name, data_dir or "").expanduser()
    broken = _first_broken_line(where) if where.exists() else None
    if broken:
        return f"unreadable data: {broken}; mend or remove it"
    while error.__cause__ is not None:
        error = error.__cause__
    found = f"{type(error).__name__}: {error}"
    if any(sign in found for sign in EMPTY):
        return f"dataset {where}: expected preference pairs, found a file without rows; remove or fill it"
    hint = "" if Path(name).expanduser().exists() else "; without hub access, point dataset_name at a local folder"
    return f"dataset {where if data_dir else name}: {found}{hint}"


def _first_broken_line(path: Path) -> str | None:
    """File and line of the first row that is no JSON object or holds text that is not text; None if all are well."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*.json*") if file.is_file())
    for file in files:
        if ".parquet" in file.suffixes:
            continue
        try:
            for number, problem in _broken_document(file) if file.suffix == ".json" else _broken_lines(file):
                return f"{file}, line {number}: {problem}"
        except (OSError, EOFError, zlib.error) as error:
            return f"{file}: {error}"
    return None


def _broken_document(file: Path) -> Iterator[tuple[int, str]]:
    """Of a `.json` file, which holds one value over several lines, or one on each line."""
    try:
        json.loads(file.read_bytes())
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg != "Extra data":
            yield error.lineno, f"expected JSON, found {error.msg}"
        else:
            yield from _broken_lines(file)


def _broken_lines(file: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode("utf-8-sig")) if line.strip() else {}
                json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is no text
            except ValueError as error:
                yield number, f"expected one JSON object, found {line[:40]!r} ({error})"
                continue
            if not isinstance(row, dict):
                yield number, f"expected a JSON object, found {type(row).__name__}"
                continue
            for column in TEXTS:
                if not isinstance(row.get(column), (str, list, type(None))):
                    yield number, f"expected text or messages in {column!r}, found {row[column]!r:.60}"


def _joined(parts: dict[str, DatasetDict], split: str, name: str) -> Dataset:
    """One split of several folders, each row with its folder's name as `subset`."""
    labelled = [_with_subset(part[split], folder.strip("/")) for folder, part in parts.items() if split in part]
    try:
        return concatenate_datasets(labelled)
    except ValueError as error:
        raise UserError(f"{name}, split {split}: expected the same columns in {list(parts)}, found: {error}") from error


def _with_subset(dataset: Dataset, name: str) -> Dataset:
    dataset = dataset.select_columns([column for column in COLUMNS[:-1] if column in dataset.column_names])
    return dataset.add_column("subset", pa.array([name] * len(dataset), pa.string()))


def _kind(dataset: Dataset, column: str, where: str) -> str:
    """`text`, `messages`, or `nothing` for a column of nulls."""
    feature = dataset.features[column]
    if _is_messages(feature):
        return "messages"
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view"):
        return "text"
    # What is left is a mistake, or messages that `datasets` keeps as JSON since their keys differ.
    odd = {row: value for row, value in enumerate(dataset[column]) if not _are_messages(value)}
    if odd:
        row = next((row for row, value in odd.items() if not isinstance(value, str)), next(iter(odd)))
        raise UserError(
            f"{where}, row {row}: expected text in every row of {column!r}, or messages (role, content) in every row, "
            f"found {odd[row]!r:.60}"
        )
    return "nothing" if isinstance(feature, Value) else "messages"


def _is_messages(feature: object) -> bool:
    item = feature.feature if isinstance(feature, List) else None
    return isinstance(item, dict) and all(
        isinstance(item.get(key), Value) and item[key].dtype in ("string", "large_string")
        for key in ("role", "content")
    )


def _are_messages(value: Any) -> bool:
    if isinstance(value, list):
        return all(item is None or (isinstance(item, dict) and _is_message(item)) for item in value)
    return value is None


def _is_message(item: dict[str, Any]) -> bool:
    return "role" in item and all(isinstance(item.get(key), (str, type(None))) for key in ("role", "content"))


def _check_margin(margins: Iterable[Any], where: str) -> None:
    for row, margin in enumerate(margins):
        number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
        if not (number and math.isfinite(margin) and abs(margin) <= LARGEST_MARGIN):
            raise UserError(f"{where}, row {row}: expected a finite number in 'margin', found {margin!r:.60}")
