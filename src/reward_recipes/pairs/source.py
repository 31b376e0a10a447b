"""Where preference pairs come from: a hub id, a folder, a saved data set or a file, read into one set of columns."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
from datasets import (
    ArrowBasedBuilder,
    BuilderConfig,
    Dataset,
    DatasetDict,
    DatasetInfo,
    DownloadManager,
    Features,
    SplitGenerator,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.builder import Key
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

from reward_recipes.pairs.dialogue import TEMPLATE_VALUES, as_messages
from reward_recipes.pairs.files import SUFFIXES, kind_of, parse_json, parse_value, rows_of
from reward_recipes.run import UserError, check_source, source_hint

READING = "2"  # of files; raise it when rows become something else, or cached ones would be used
SIDES = ("chosen", "rejected")
TEXTS = ("prompt", *SIDES)
COLUMNS = (*TEXTS, "margin", "subset", *TEMPLATE_VALUES)
LARGEST_MARGIN = 3e38  # of float32
ROWS_AT_ONCE = 1000
_CSV = {"keep_default_na": False}
# Of `datasets`, by suffix; JSON where none is named.
READERS = {
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
}


class SeveralAnswers(UserError):
    """A side of a row is a list of answers, which an evaluation can read and a training cannot."""


@dataclass(frozen=True)
class Pairs:
    """One split as it stands in its source.

    Attributes:
        rows: those of `COLUMNS` that the source has; `row_at` reads what is kept as JSON.
        messages: which columns hold messages rather than text.
        name: how to call the split in an error.
        unread: names of the source's other columns.
        files: each file's name and its number of rows, in the order of the rows.
    """

    rows: Dataset
    messages: frozenset[str]
    name: str
    unread: tuple[str, ...] = ()
    files: tuple[tuple[str, int], ...] = ()

    def row_at(self, row: int) -> dict[str, Any]:
        """A row with its messages, tools and options as they are."""
        return self.parsed(self.rows[row])

    def parsed(self, row: dict[str, Any]) -> dict[str, Any]:
        """One of `rows`, with what is kept as JSON read."""
        as_json = {*self.messages, *TEMPLATE_VALUES}
        return {name: json.loads(value) if name in as_json and value else value for name, value in row.items()}

    def place(self, row: int) -> str:
        """Where a row stands, for an error: its file and the number in that, counted from 0."""
        for file, count in self.files:
            if row < count:
                return f"{file}, row {row}"
            row -= count
        return f"{self.name}, row {row}"

    def checked(self, with_margin: bool = False) -> "Pairs":
        """Pairs with both sides; raises `UserError` without those columns.

        Where margins are trained on, `with_margin`, their column needs one in every row; else one with gaps goes.
        """
        if missing := {*SIDES} - {*self.rows.column_names}:
            found = sorted((*self.rows.column_names, *self.unread))
            raise UserError(
                f"{self.name}: expected columns 'chosen' and 'rejected', found {found}; name what stands for "
                f"{sorted(missing)} by --columns"
            )
        margins = self.rows.data.column("margin") if "margin" in self.rows.column_names else None
        if margins is None or not margins.null_count:
            return self
        if with_margin:
            row = margins.is_null().index(True).as_py()
            raise UserError(f"{self.place(row)}: expected a finite number in 'margin', found None")
        return replace(self, rows=self.rows.remove_columns("margin"))


def load_pairs(
    name: str,
    config_name: str | None = None,
    data_dirs: list[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Pairs]:
    """Load every split of preference pairs.

    Args:
        name: hub id, or the path of a folder (of files, or by `save_to_disk`) or of a file, which is split `train`.
        config_name: configuration of the dataset, as in `datasets.load_dataset(name, config_name)`.
        data_dirs: folders inside the dataset; each is loaded on its own and its name fills the column `subset`.
        columns: the source's names of columns, by ours, where they differ.

    Raises:
        UserError: nothing there, a file that is damaged, or a value of the wrong kind (named with its row).
    """
    _check_name(name)
    path = Path(name).expanduser()
    for option, value in (("dataset_config", config_name), ("dataset_data_dirs", data_dirs)):
        if value and path.is_file():
            raise UserError(f"{option}={value!r} would have no effect on the single file {path}; remove it")
    if data_dirs is None:
        return _load(name, config_name, None, columns or {})
    splits: dict[str, dict[str, Pairs]] = {}
    for folder in dict.fromkeys(map(_inside, data_dirs)):
        for split, part in _load(name, config_name, folder, columns or {}).items():
            splits.setdefault(split, {})[folder] = part
    return {split: _joined(parts) for split, parts in splits.items()}


def load_rows(name: str, config_name: str | None, split: str) -> Dataset:
    """One split of any data set with all of its columns, on disk; sources and errors are those of `load_pairs`."""
    _check_name(name)
    path = Path(name).expanduser()
    with _reading(name, name):
        if path.is_file():
            reader, options = READERS.get(kind_of(name), ("json", {}))
            return load_dataset(reader, data_files=str(path), split=split, **options)
        if _saved_splits(path):
            saved = load_from_disk(str(path))
            return saved[split] if isinstance(saved, DatasetDict) else saved
        return load_dataset(str(path) if path.is_dir() else name, config_name, split=split)


def _check_name(name: str) -> None:
    if not name.startswith(("hf://", "buckets/")):  # which `datasets` knows as well
        check_source("dataset_name", name)


def read_columns(columns: Any, known: Sequence[str] = COLUMNS) -> dict[str, str] | None:
    """The option `columns`, which the command line gives as JSON; raises `UserError` for a name that is not `known`."""
    try:
        found = parse_json(columns) if isinstance(columns, str) else columns
    except ValueError:
        found = columns
    if found is not None and not (isinstance(found, dict) and all(isinstance(name, str) for name in found.values())):
        raise UserError(f"columns: expected a mapping such as {{prompt: question}}, found {columns!r}")
    if strange := set(found or {}) - set(known):
        raise UserError(f"columns: expected names among {', '.join(known)}, found {sorted(strange)}")
    return found


def split_of(splits: Mapping[str, Pairs], split: str, name: str, option: str) -> Pairs:
    """One split of what `load_pairs` gives for a name; raises `UserError`, with the option that names it, for none."""
    if split not in splits:
        single = " (a single file is one split, train)" if Path(name).expanduser().is_file() else ""
        raise UserError(f"{name}: expected a split {split!r}, found {sorted(splits)}{single}; name one by --{option}")
    return splits[split]


def _inside(folder: str) -> str:
    """A folder's name, in one way of writing it."""
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise UserError(f"dataset_data_dirs: expected names of folders inside the dataset, found {folder!r}")
    return str(path)


def _joined(parts: Mapping[str, Pairs]) -> Pairs:
    """One split of several folders, each row with its folder's name as `subset`."""
    rows, first = [], next(iter(parts.values()))
    for folder, part in parts.items():
        if odd := {*TEXTS} & ({*first.rows.column_names} ^ {*part.rows.column_names}):
            raise UserError(f"{first.name}: expected the same columns in {list(parts)}, found {sorted(odd)} in some")
        if odd := sorted(first.messages ^ part.messages):
            raise UserError(
                f"{first.name}: expected the same columns in {list(parts)}, found text in {odd} of some and messages "
                "in others"
            )
        labels = pa.array([folder] * len(part.rows), pa.string())
        bare = part.rows.select_columns([column for column in part.rows.column_names if column != "subset"])
        rows.append(bare.add_column("subset", labels))
    unread = dict.fromkeys(column for part in parts.values() for column in part.unread)
    files = tuple(file for part in parts.values() for file in part.files)
    return replace(first, rows=concatenate_datasets(rows), unread=tuple(unread), files=files)


def _load(name: str, config_name: str | None, data_dir: str | None, columns: Mapping[str, str]) -> dict[str, Pairs]:
    with _reading(name, Path(name, data_dir) if data_dir else name):
        data_files = _data_files(name, config_name, data_dir)
        builder = PairReader(hash=READING, data_files=data_files, columns=dict(columns))
        builder.download_and_prepare()
        splits = {str(split): builder.as_dataset(_as_identifier(split)) for split in data_files}
    found = json.loads(builder.info.description)
    if missing := {theirs for ours, theirs in columns.items() if ours not in found["seen"]}:
        there = sorted({*(columns.get(ours, ours) for ours in found["seen"]), *found["unread"]})
        raise UserError(
            f"columns: expected names of columns in {name}, found {sorted(missing)} that are none of {there}"
        )
    seen = [column for column in COLUMNS if column in found["seen"]]
    messages, unread = frozenset(found["messages"]), tuple(found["unread"])
    pairs = {}
    for split, rows in splits.items():
        kept = [column for column in seen if column in SIDES or rows.data.column(column).null_count < len(rows)]
        files = tuple((file, count) for file, count in found["files"][split])
        pairs[split] = Pairs(rows.select_columns(kept), messages, f"{name}, split {split}", unread, files)
    return pairs


@contextmanager
def _reading(name: str, where: str | Path) -> Iterator[None]:
    """Turn what `datasets` raises into one line; it passes on whatever its readers raise."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log what it raises
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        hint = source_hint(error, name, "dataset_name")
        raise UserError(f"dataset {where}: {type(cause).__name__}: {cause}{hint}") from error
    finally:
        datasets.logging.set_verbosity(level)


def _data_files(name: str, config_name: str | None, data_dir: str | None) -> Mapping[str, Any]:
    """Files by split."""
    path = Path(name).expanduser()
    folder = path / (data_dir or "")
    if path.is_file():
        return {"train": [str(path)]}
    if saved := _saved_splits(folder):
        return saved
    if path.is_dir() and not config_name and not (path / "README.md").is_file():  # all kinds of files at once
        return DataFilesDict.from_patterns(sanitize_patterns(get_data_patterns(str(folder))), base_path=str(folder))
    return load_dataset_builder(str(path) if path.is_dir() else name, config_name, data_dir=data_dir).config.data_files


def _as_identifier(split: Any) -> str:
    """A split's name as the builder may have it: `save_to_disk` takes others, such as `part-b.v1`."""
    return str(split) if str(split).isidentifier() else f"part_{str(split).encode().hex()}"


def _saved_splits(folder: Path) -> dict[str, list[str]]:
    """The files of what `save_to_disk` wrote, by split; nothing for another folder."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return {}
    saved = load_from_disk(str(folder))
    parts = saved if isinstance(saved, DatasetDict) else {"train": saved}
    return {split: [file["filename"] for file in part.cache_files] for split, part in parts.items()}


@dataclass
class ReaderConfig(BuilderConfig):
    """What decides how rows are read, and so which cached ones may be used."""

    columns: dict[str, str] = field(default_factory=dict)  # the source's names by ours


class PairReader(ArrowBasedBuilder):
    """Reads the files of a data set into our columns, and notes in its description what it left unread."""

    BUILDER_CONFIG_CLASS = ReaderConfig

    def _info(self) -> DatasetInfo:
        self._has_messages: dict[str, bool] = {}  # by column, as its first value says
        self._seen: set[str] = set()
        self._unread: set[str] = set()
        self._files: dict[str, list[tuple[str, int]]] = {}
        texts = {name: Value("string") for name in COLUMNS}
        return DatasetInfo(features=Features(texts | {"margin": Value("float64")}))

    def _split_generators(self, dl_manager: DownloadManager) -> list[SplitGenerator]:
        paths = dl_manager.download(self.config.data_files)
        generators = []
        for split, names in self.config.data_files.items():
            files = [(name, path) for name, path in zip(names, paths[split], strict=True) if kind_of(name)]
            if not files:
                raise UserError(f"{names[0]}: expected a file ending in {', '.join(SUFFIXES)}; convert it")
            generators.append(SplitGenerator(_as_identifier(split), {"split": str(split), "files": files}))
        return generators

    def _generate_tables(self, split: str, files: list[tuple[str, str]]) -> Iterator[tuple[Key, pa.Table]]:
        self._files[split] = []
        for number, file in enumerate(files):
            rows, count = self._rows(file), 0
            while batch := list(islice(rows, ROWS_AT_ONCE)):
                columns = {name: [row[name] for row in batch] for name in COLUMNS}
                yield Key(number, count), pa.table(columns, schema=self.info.features.arrow_schema)
                count += len(batch)
            self._files[split].append((file[0], count))
        if not any(count for _, count in self._files[split]):
            raise UserError(f"{files[0][0]}: expected preference pairs, found no rows; remove or fill it")
        found = {"seen": sorted(self._seen), "unread": sorted(self._unread), "files": self._files}
        found["messages"] = [name for name, has in self._has_messages.items() if has]
        self.info.description = json.dumps(found)

    def _rows(self, file: tuple[str, str]) -> Iterator[dict[str, Any]]:
        """Each row of a file as our columns keep it."""
        theirs = {column: self.config.columns.get(column, column) for column in COLUMNS}
        empty = dict.fromkeys(COLUMNS)
        for place, row in rows_of(*file, theirs.values(), self._unread):
            given = [column for column, name in theirs.items() if name in row]
            self._seen.update(given)
            try:
                yield empty | {column: self._cell(column, row[theirs[column]]) for column in given}
            except (ValueError, TypeError) as error:
                raise UserError(f"{place}: {error}") from error

    def _cell(self, column: str, value: Any) -> str | float | None:
        """A value as its column keeps it; raises ValueError for one of the wrong kind."""
        if value is None or (value == "" and column not in TEXTS):  # an empty cell of a CSV file
            return None
        if column in TEXTS:
            return self._text(column, value)
        if column == "margin":
            return _margin(value)
        if column in TEMPLATE_VALUES:
            return json.dumps(parse_value(value, TEMPLATE_VALUES[column], column))
        if not isinstance(value, (str, int, float)):
            raise ValueError(f"expected a name in {column!r}, found {value!r:.60}")
        return str(value)

    def _text(self, column: str, value: Any) -> str:
        if column not in self._has_messages and isinstance(value, list) and value and not isinstance(value[0], dict):
            raise SeveralAnswers(
                f"expected messages (role, content) or text in {column!r}, found a list of answers, which "
                "reward_recipes.evaluate reads and a training cannot; make a pair of each right and each wrong one"
            )
        is_text = isinstance(value, str) and not self._has_messages.get(column, True)
        messages = None if is_text else as_messages(value)
        has_messages = self._has_messages.setdefault(column, messages is not None)
        if has_messages != (messages is not None) or not isinstance(value, (str, list)):
            expected = "messages (role, content)" if has_messages else "text"
            raise ValueError(f"expected {expected} in every row of {column!r}, found {value!r:.60}")
        text = value if messages is None else json.dumps(messages, ensure_ascii=False)
        text.encode()  # raises for half a surrogate pair, which no tokenizer takes
        return text


def _margin(value: Any) -> float:
    with suppress(ValueError, TypeError, OverflowError):
        number = float(value)
        if abs(number) <= LARGEST_MARGIN and not isinstance(value, bool):
            return number
    raise ValueError(f"expected a finite number in 'margin', found {value!r:.60}")
