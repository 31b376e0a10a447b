"""Where preference pairs come from, and what makes a source unreadable."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from reward_recipes.errors import UserError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COLUMNS = ("prompt", "chosen", "rejected", "margin", "subset")


def load_pairs(name: str, config_name: str | None = None, data_dirs: list[str] | None = None) -> DatasetDict:
    """Load preference pairs from a hub id, a local folder, or a jsonl or parquet file (which becomes split `train`).

    Args:
        name: hub id or path.
        config_name: configuration of the dataset, as in `datasets.load_dataset(name, config_name)`.
        data_dirs: folders inside the dataset; each is loaded on its own and its name fills the column `subset`.

    Returns:
        Splits with the columns `chosen` and `rejected` (text or messages) and, where the source has them, `prompt`,
        `margin` and `subset`.

    Raises:
        UserError: nothing there, a broken file (named with its line), missing columns, or text that is not text.
    """
    if data_dirs is None:
        splits = _load(name, config_name)
    else:
        parts = {folder: _load(name, config_name, data_dir=folder) for folder in data_dirs}
        splits = DatasetDict()
        for split in {split: None for part in parts.values() for split in part}:
            labelled = [_with_subset(part[split], folder) for folder, part in parts.items() if split in part]
            splits[split] = concatenate_datasets(labelled)
    return DatasetDict({split: _checked(dataset, f"{name}, split {split}") for split, dataset in splits.items()})


def choose_split(splits: DatasetDict, name: str) -> Dataset:
    """The split of that name; `UserError` names the splits that there are."""
    if name not in splits:
        raise UserError(f"expected a split {name!r}, found {sorted(splits)}; set dataset_train_split or eval_splits")
    return splits[name]


def _load(name: str, config_name: str | None, data_dir: str | None = None) -> DatasetDict:
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return load_dataset(_builder(path), data_files={"train": str(path)})
        return load_dataset(str(path) if path.is_dir() else name, config_name, data_dir=data_dir)
    except (DatasetGenerationError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        found = _first_broken_line(path) or f"{name}: {_innermost(error)}"
        raise UserError(f"unreadable data: {found}") from error
    except (OSError, ValueError) as error:  # hub and file errors of datasets derive from these
        hint = "" if path.exists() else "; without hub access, point dataset_name at a local folder or file"
        where = f"{name}/{data_dir}" if data_dir else name
        raise UserError(f"dataset {where}: {_innermost(error)}{hint}") from error


def _builder(path: Path) -> str:
    for suffix in path.suffixes:
        if suffix in BUILDERS:
            return BUILDERS[suffix]
    raise UserError(f"{path}: expected a file ending in {', '.join(BUILDERS)}, found {path.name!r}")


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _first_broken_line(path: Path) -> str | None:
    """File and line of the first row that is no JSON object or holds text that is not text; None if all are well."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if BUILDERS.get(file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix) == "json":
            for number, problem in _broken_lines(file):
                return f"{file}, line {number}: {problem}"
    return None


def _broken_lines(file: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                yield number, f"expected one JSON object, found {line[:40]!r} ({error})"
                continue
            if not isinstance(row, dict):
                yield number, f"expected a JSON object, found {type(row).__name__}"
                continue
            for column in ("prompt", "chosen", "rejected"):
                if not isinstance(row.get(column), (str, list, type(None))):
                    yield number, f"expected text or messages in {column!r}, found {row[column]!r:.60}"


def _with_subset(dataset: Dataset, name: str) -> Dataset:
    dataset = dataset.remove_columns("subset") if "subset" in dataset.column_names else dataset
    return dataset.add_column("subset", pa.array([name] * len(dataset)))


def _checked(dataset: Dataset, where: str) -> Dataset:
    missing = {"chosen", "rejected"} - set(dataset.column_names)
    if missing:
        raise UserError(f"{where}: expected columns 'chosen' and 'rejected', found {sorted(dataset.column_names)}")
    if len(dataset) == 0:
        raise UserError(f"{where}: expected preference pairs, found no rows")
    dataset = dataset.select_columns([column for column in COLUMNS if column in dataset.column_names])
    for column in ("prompt", "chosen", "rejected"):
        if column in dataset.column_names and not _is_text(dataset.features[column]):
            _reject_values(dataset, column, where)
    if is_conversational(dataset.features) and not _is_messages(dataset.features["rejected"]):
        raise UserError(f"{where}: expected 'chosen' and 'rejected' alike, found messages and plain text")
    _check_margin(dataset, where)
    return dataset


def is_conversational(features: Features) -> bool:
    """Whether the pairs are lists of messages (`role`, `content`) rather than plain text."""
    return _is_messages(features["chosen"])


def _is_text(feature: object) -> bool:
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "null")
    return _is_messages(feature)


def _is_messages(feature: object) -> bool:
    item = feature.feature if isinstance(feature, List) else feature[0] if isinstance(feature, list) else None
    return isinstance(item, dict) and all(
        isinstance(item.get(key), Value) and item[key].dtype in ("string", "large_string")
        for key in ("role", "content")
    )


def _reject_values(dataset: Dataset, column: str, where: str) -> None:
    for row, value in enumerate(dataset[column]):
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"{where}, row {row}: expected text or messages (role, content) in {column!r}, found {value!r:.60}"
            )


def _check_margin(dataset: Dataset, where: str) -> None:
    if "margin" not in dataset.column_names:
        return
    for row, margin in enumerate(dataset["margin"]):
        number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
        if not number or margin != margin:
            raise UserError(f"{where}, row {row}: expected a number in 'margin', found {margin!r:.60}")
