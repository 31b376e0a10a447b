"""Where preference pairs come from, and what makes a source unreadable."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)

from reward_recipes.pairs.json_rows import TEXTS, first_problem
from reward_recipes.run import UserError, check_source

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
JSON, PARQUET = {".json", ".jsonl", ".ndjson"}, {".parquet"}
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
    if not name.startswith(("hf://", "buckets/")):  # which `datasets` knows as well
        check_source("dataset_name", name)
    path = Path(name).expanduser()
    for option, value in (("dataset_config", config_name), ("dataset_data_dirs", data_dirs)):
        if value and path.is_file():
            raise UserError(f"{option}={value!r} would have no effect on the single file {path}; remove it")
    if data_dirs is None:
        return _load(name, config_name)
    folders = dict.fromkeys(_inside(folder) for folder in data_dirs)
    parts = {folder: _load(name, config_name, data_dir=folder) for folder in folders}
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
    kinds = {column: column_kind(dataset, column, where) for column in TEXTS if column in dataset.column_names}
    if {"text", "messages"} <= {kinds["chosen"], kinds["rejected"]}:
        raise UserError(f"{where}: expected 'chosen' and 'rejected' alike, found {kinds}; make both text or messages")
    if kinds.get("prompt") == "messages" and "text" in kinds.values():
        raise UserError(f"{where}: expected a prompt like the replies, found {kinds}; make them all text or messages")
    if "subset" in dataset.column_names and not isinstance(dataset.features["subset"], (Value, ClassLabel)):
        raise UserError(f"{where}: expected a name in 'subset', found {dataset[0]['subset']!r:.60}")
    if kinds.get("prompt") == kinds["chosen"] == kinds["rejected"] == "text" and _repeat_prompts(dataset):
        raise UserError(f"{where}: expected replies beside 'prompt', found whole texts that begin with it; remove it")
    if isinstance(dataset.features.get("subset"), ClassLabel):
        names = dataset.features["subset"].names
        labels = [None if number is None else names[number] for number in dataset["subset"]]
        dataset = dataset.remove_columns("subset").add_column("subset", labels)
    return _with_checked_margin(dataset, where) if "margin" in dataset.column_names else dataset


def split_of(splits: DatasetDict, split: str, name: str, option: str) -> Dataset:
    """One split of what `load_pairs` gives for a name; raises `UserError`, with the option that names it, for none."""
    if split not in splits:
        single = " (a single file is one split, train)" if Path(name).expanduser().is_file() else ""
        raise UserError(f"{name}: expected a split {split!r}, found {sorted(splits)}{single}; name one by --{option}")
    return splits[split]


def _repeat_prompts(dataset: Dataset) -> bool:
    """Whether both sides begin with the prompt in all of the first rows, so that joining would double it."""
    rows = dataset.select(range(min(100, len(dataset))))
    return all(
        row["prompt"] and all((row[side] or "").startswith(row["prompt"]) for side in ("chosen", "rejected"))
        for row in rows
    )


def is_conversational(features: Features) -> bool:
    """Whether checked pairs are lists of messages (`role`, `content`) rather than plain text."""
    return not isinstance(features["chosen"], Value)


def _inside(folder: str) -> str:
    """A folder's name, in one way of writing it."""
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in folder:
        raise UserError(f"dataset_data_dirs: expected names of folders inside the dataset, found {folder!r}")
    return str(path)


def _load(name: str, config_name: str | None, data_dir: str | None = None) -> DatasetDict:
    path = Path(name).expanduser()
    source: dict[str, Any] = {"path": name, "name": config_name, "data_dir": data_dir}
    if path.is_file():
        source = {"path": _builder(path), "data_files": {"train": str(path)}}
    elif path.is_dir():
        source["path"] = str(path)
    try:
        with _quiet():
            if path.exists():
                _check_files(load_dataset_builder(**source).config.data_files)
            splits = load_dataset(**source)
        for split in splits.values():
            split.data.validate(full=True)  # Arrow's JSON reader lets bytes through that are not UTF-8
        return splits
    except UserError:
        raise
    except Exception as error:  # `datasets` passes on whatever its readers raise
        raise UserError(_explain(name, data_dir, error)) from error


def _check_files(data_files: Mapping[str, Iterable[str]] | None) -> None:
    """Look through the files of a local source first, since `datasets` makes something of much that is wrong."""
    for file in (Path(name) for names in (data_files or {}).values() for name in names):
        suffixes = {suffix.lower() for suffix in file.suffixes} if file.is_file() else set()
        problem = first_problem(file) if suffixes & JSON else _odd_column(file) if suffixes & PARQUET else None
        if problem:
            raise UserError(f"unreadable data: {problem}; mend or remove it")


def _odd_column(file: Path) -> str | None:
    """Numbers where another file may have text, which `datasets` would make text too."""
    for column in pq.read_schema(file):
        if column.name in TEXTS and (pa.types.is_primitive(column.type) or pa.types.is_decimal(column.type)):
            return f"{file}: expected text or messages in {column.name!r}, found {column.type}"
    return None


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
    while error.__cause__ is not None:
        error = error.__cause__
    found = f"{type(error).__name__}: {error}"
    if any(sign in found for sign in EMPTY):
        return f"dataset {where}: expected preference pairs, found a file without rows; remove or fill it"
    hint = "" if Path(name).expanduser().exists() else "; without hub access, point dataset_name at a local folder"
    return f"dataset {where if data_dir else name}: {found}{hint}"


def _joined(parts: dict[str, DatasetDict], split: str, name: str) -> Dataset:
    """One split of several folders, each row with its folder's name as `subset`."""
    labelled = [_with_subset(part[split], folder) for folder, part in parts.items() if split in part]
    try:
        return concatenate_datasets(labelled)
    except ValueError as error:
        raise UserError(f"{name}, split {split}: expected the same columns in {list(parts)}, found: {error}") from error


def _with_subset(dataset: Dataset, name: str) -> Dataset:
    dataset = dataset.select_columns([column for column in COLUMNS[:-1] if column in dataset.column_names])
    return dataset.add_column("subset", pa.array([name] * len(dataset), pa.string()))


def column_kind(dataset: Dataset, column: str, where: str) -> str:
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


def _with_checked_margin(dataset: Dataset, where: str) -> Dataset:
    margins = list(dataset["margin"])
    if all(margin is None for margin in margins):  # `datasets` gives a split the columns of the others, as nulls
        return dataset.remove_columns("margin")
    for row, margin in enumerate(margins):
        number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
        if not (number and math.isfinite(margin) and abs(margin) <= LARGEST_MARGIN):
            raise UserError(f"{where}, row {row}: expected a finite number in 'margin', found {margin!r:.60}")
    return dataset
