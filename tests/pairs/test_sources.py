"""Pairs are read from every layout through one path, and what cannot be read is told with its place and a way out."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REAL_DATA, hh_pairs, needs_real_data, write_jsonl
from datasets import ClassLabel, Dataset, Features, Value

from reward_recipes.pairs.source import checked_pairs, is_conversational, load_pairs
from reward_recipes.run.errors import UserError

PAIRS = hh_pairs(3)
LINES = "".join(json.dumps(pair) + "\n" for pair in PAIRS).encode()
BROKEN = LINES + b'{"chosen": "cut off\n'


def messages(*contents: object) -> list[dict[str, object]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def checked(path: Path | str, split: str = "train") -> Dataset:
    return checked_pairs(load_pairs(str(path))[split], "here")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.jsonl", LINES),
        ("pairs.jsonl.gz", gzip.compress(LINES)),
        ("PAIRS.JSONL", LINES),
        ("lines.json", LINES),
        ("array.json", json.dumps(PAIRS, indent=1).encode()),
        ("windows.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n") + b"\n"),
    ],
)
def test_a_single_file_is_the_training_split(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    splits = load_pairs(str(tmp_path / name))
    assert list(splits) == ["train"] and splits["train"].to_list() == PAIRS


@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_with_any_kind_of_text_column(text: pa.DataType, tmp_path: Path) -> None:
    columns = {side: pa.array([pair[side] for pair in PAIRS]).cast(text) for side in ("chosen", "rejected")}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    assert checked(tmp_path / "pairs.parquet").to_list() == PAIRS


def test_folder_gives_its_splits_and_only_our_columns(tmp_path: Path) -> None:
    extra = {"prompt": "Q", "margin": 1, "subset": "s", "score": 3.5, "id": "x"}
    write_jsonl(tmp_path / "train.jsonl", [PAIRS[0] | extra])
    write_jsonl(tmp_path / "test.jsonl", [PAIRS[1] | extra])
    (tmp_path / "README.md").write_text("notes\n")
    assert set(load_pairs(str(tmp_path))) == {"train", "test"}
    assert checked(tmp_path, "test").to_list() == [PAIRS[1] | {"prompt": "Q", "margin": 1, "subset": "s"}]


def test_folders_of_a_dataset_fill_subset(tmp_path: Path) -> None:
    """As HH-RLHF on the hub: a subset a folder, `b` without a test split, `a` with a column of its own."""
    write_jsonl(tmp_path / "a" / "train.jsonl", [PAIRS[0] | {"subset": "overwritten", "note": "dropped"}])
    write_jsonl(tmp_path / "a" / "test.jsonl", [PAIRS[1]])
    write_jsonl(tmp_path / "b" / "train.jsonl", [PAIRS[2]])
    splits = load_pairs(str(tmp_path), data_dirs=["b", "a/"])
    assert splits["train"].to_list() == [PAIRS[2] | {"subset": "b"}, PAIRS[0] | {"subset": "a"}]
    assert splits["test"].to_list() == [PAIRS[1] | {"subset": "a"}]


@needs_real_data
def test_real_subsets_are_counted() -> None:
    names = ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
    splits = load_pairs(str(REAL_DATA / "hh-rlhf"), data_dirs=names)
    counts = {split: {name: splits[split]["subset"].count(name) for name in names} for split in splits}
    assert list(counts["train"].values()) == [1482, 1522, 875, 2175]
    assert list(counts["test"].values()) == [430, 430, 130, 272]
    whole = load_pairs(str(REAL_DATA / "hh-rlhf"))
    assert {split: len(whole[split]) for split in whole} == {"train": 6054, "test": 1262}


def test_messages_whose_keys_differ_are_still_messages(tmp_path: Path) -> None:
    """`datasets` keeps such a column as JSON instead of structs."""
    named = [{"role": "user", "content": "Q", "name": "Ann"}, {"role": "assistant", "content": "A"}]
    rows = [
        {"chosen": named, "rejected": messages("Q", "B")},
        {"chosen": messages("Q", None), "rejected": messages("Q", "B")},
        {"chosen": None, "rejected": messages("Q", "B")},
    ]
    dataset = checked(write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert is_conversational(dataset.features) and dataset[0]["chosen"] == named


def test_columns_may_hold_nulls(tmp_path: Path) -> None:
    rows = [{"prompt": None, "chosen": "A", "rejected": None}, {"prompt": None, "chosen": None, "rejected": "B"}]
    dataset = checked(write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert dataset.to_list() == rows and not is_conversational(dataset.features)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", BROKEN, 'x.jsonl, line 4: expected one JSON object, found b\'{"chosen": "cut off'),
        ("x.jsonl.gz", gzip.compress(BROKEN), "x.jsonl.gz, line 4: expected one JSON object"),
        ("x.json", BROKEN, "x.json, line 4: "),
        ("x.json", b'[\n{"chosen": "a",\n"rejected" "b"}]', "x.json, line 3: "),
        ("x.jsonl", LINES + b"[1, 2]\n", "x.jsonl, line 4: expected a JSON object, found list"),
        ("x.jsonl", LINES + b'{"chosen": "\\ud800", "rejected": "b"}\n', "x.jsonl, line 4: .*surrogates not allowed"),
        ("x.jsonl", LINES + b'{"chosen": "caf\xe9", "rejected": "b"}\n', "x.jsonl, line 4: .*can't decode byte 0xe9"),
        ("x.jsonl", LINES.decode().encode("utf-16"), "x.jsonl, line 1: "),
        ("x.jsonl", b'{"chosen": 1, "rejected": 2}', "x.jsonl, line 1: expected text or messages in 'chosen', found 1"),
        ("x.jsonl", LINES + b'{"chosen": "a", "rejected": true}', "line 4: expected text .* in 'rejected', found True"),
        (
            "x.jsonl",
            b'{"chosen": {"role": "user", "content": "Q"}, "rejected": "b"}',
            "line 1: .*found {'role': 'user'",
        ),
        ("x.json", b'[{"chosen": "a", "rejected": "b", "prompt": 5}]', "row 0: expected text .* in 'prompt', found 5"),
        ("x.jsonl", LINES + b"null", "x.jsonl, line 4: expected a JSON object, found NoneType"),
        ("x.jsonl.gz", LINES, "x.jsonl.gz: Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(LINES)[:-12], "x.jsonl.gz: Compressed file ended"),
        ("x.jsonl", b"", "x.jsonl: expected preference pairs, found a file without rows"),
        ("x.jsonl", b"\n\n", "x.jsonl: expected preference pairs, found a file without rows"),
        ("x.parquet", b"PAR1", "x.parquet: ArrowInvalid: Parquet file size is 4 bytes"),
        ("x.csv", b"chosen,rejected\na,b\n", r"expected a file ending in .jsonl, .json, .parquet, found 'x.csv'"),
    ],
)
def test_unreadable_file_is_named_with_its_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_pairs(str(tmp_path / name))


def test_broken_file_of_a_folder_is_found_among_sound_ones(tmp_path: Path) -> None:
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"about": {"lines": 3}}, indent=1))
    write_jsonl(tmp_path / "a" / "train.jsonl", PAIRS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.jsonl").write_bytes(BROKEN)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/b/train.jsonl, line 4")):
        load_pairs(str(tmp_path))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/b/train.jsonl, line 4")):
        load_pairs(str(tmp_path), data_dirs=["a", "b"])


def test_nothing_there_says_how_to_go_on(tmp_path: Path) -> None:
    for name, options, message in [
        (str(tmp_path), {}, "doesn't contain any data files"),
        (
            str(tmp_path / "gone.jsonl"),
            {},
            "dataset_name: expected .* that is there, found nothing at .*gone.jsonl",
        ),
        ("hf://datasets/nobody/nothing", {}, "dataset hf://datasets/nobody/nothing: "),
        ("nobody/nothing", {}, "dataset nobody/nothing: .*without hub access, point dataset_name at a local folder"),
        (str(tmp_path), {"data_dirs": ["gone"]}, f"dataset {tmp_path}/gone: "),
    ]:
        with pytest.raises(UserError, match=message):
            load_pairs(name, **options)


def test_options_that_a_single_file_cannot_honour_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(UserError, match=r"dataset_data_dirs=\['a', 'b'\] would have no effect on the single file"):
        load_pairs(str(path), data_dirs=["a", "b"])
    with pytest.raises(UserError, match="dataset_config='en' would have no effect"):
        load_pairs(str(path), "en")


def test_folders_whose_columns_differ_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "train.jsonl", PAIRS)
    write_jsonl(tmp_path / "b" / "train.jsonl", [{"chosen": messages("Q", "A"), "rejected": messages("Q", "B")}])
    with pytest.raises(UserError, match=r"split train: expected the same columns in \['a', 'b'\], found"):
        load_pairs(str(tmp_path), data_dirs=["a", "b"])


CHAT = {"chosen": messages("Q", "A"), "rejected": messages("Q", "B")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"chosen": "a", "negative": "b"}],
            r"expected columns 'chosen' and 'rejected', found \['chosen', 'negative'\]",
        ),
        ([{"chosen": "a", "rejected": ["b", "c"]}], r"row 0: expected text in every row of 'rejected', .*\['b', 'c'\]"),
        ([CHAT, PAIRS[0]], "row 1: expected text in every row of 'chosen', or messages .* in every row"),
        ([CHAT | {"chosen": messages(3)}], "row 0: .*found .*'content': 3"),
        ([CHAT | {"chosen": messages([{"type": "text"}])}], "row 0: .*found .*'type': 'text'"),
        (
            [{"chosen": [{"from": "human", "value": "Q"}], "rejected": [{"from": "gpt", "value": "A"}]}],
            "'from': 'human'",
        ),
        ([CHAT | {"rejected": "b"}], "expected 'chosen' and 'rejected' alike, found .*'rejected': 'text'"),
        ([CHAT | {"chosen": "a"}], "expected 'chosen' and 'rejected' alike, found .*'chosen': 'text'"),
        ([PAIRS[0] | {"prompt": messages("Q")}], "expected a prompt like the replies, found .*'prompt': 'messages'"),
        ([PAIRS[0] | {"margin": "2"}], "row 0: expected a finite number in 'margin', found '2'"),
        ([PAIRS[0] | {"margin": True}], "finite number in 'margin', found True"),
        ([PAIRS[0] | {"margin": 1}, PAIRS[1] | {"margin": None}], "row 1: .*'margin', found None"),
        ([PAIRS[0] | {"margin": 1e39}], "finite number in 'margin', found 1e\\+39"),
        ([PAIRS[0] | {"subset": ["a"]}], r"expected a name in 'subset', found \['a'\]"),
    ],
)
def test_pairs_that_are_not_pairs_are_refused(rows: list[dict], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError, match=f"^here.*{message}"):
        checked(path)


@pytest.mark.parametrize("margin", [float("nan"), float("inf")])
def test_margin_must_be_finite(margin: float) -> None:
    dataset = Dataset.from_list([PAIRS[0] | {"margin": margin}])
    with pytest.raises(UserError, match="expected a finite number in 'margin'"):
        checked_pairs(dataset, "here")


def test_no_rows_are_refused(tmp_path: Path) -> None:
    empty = Dataset.from_list(PAIRS).select([])
    with pytest.raises(UserError, match="here: expected preference pairs, found no rows"):
        checked_pairs(empty, "here")
    empty.to_parquet(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="found a file without rows"):
        load_pairs(str(tmp_path / "none.parquet"))


def test_a_prompt_that_both_sides_repeat_is_an_error() -> None:
    rows = {"prompt": ["A: ", "B: "], "chosen": ["A: x", "B: y"], "rejected": ["A: z", "B: w"]}
    with pytest.raises(UserError, match="whole texts that begin with it"):
        checked_pairs(Dataset.from_dict(rows), "here")
    rows["rejected"][1] = "w"
    assert len(checked_pairs(Dataset.from_dict(rows), "here")) == 2


def test_a_class_label_is_known_by_its_name() -> None:
    features = Features(
        {"chosen": Value("string"), "rejected": Value("string"), "subset": ClassLabel(names=["easy", "hard"])}
    )
    rows = {"chosen": ["a", "b"], "rejected": ["c", "d"], "subset": [1, 0]}
    assert list(checked_pairs(Dataset.from_dict(rows, features=features), "here")["subset"]) == ["hard", "easy"]
