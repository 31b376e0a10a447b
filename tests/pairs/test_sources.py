"""Pairs are read from files, folders and folders of folders through one path; what is missing is told with a way out.

What a single file may hold is in test_hostile_data.py.
"""

from pathlib import Path
from typing import Any

import pytest
from conftest import REAL_DATA, hh_pairs, needs_real_data, write_jsonl
from datasets import ClassLabel, Dataset, Features, Value

from reward_recipes.pairs import Pairs, load_pairs
from reward_recipes.run import UserError

PAIRS = hh_pairs(3)


def rows_of(pairs: Pairs) -> list[dict[str, Any]]:
    return [pairs.row_at(row) for row in range(len(pairs.rows))]


def test_folder_gives_its_splits_and_only_our_columns(tmp_path: Path) -> None:
    ours = {"prompt": "Q", "margin": 1, "subset": "s"}
    for split, pair in zip(("train", "test"), PAIRS, strict=False):
        write_jsonl(tmp_path / f"{split}.jsonl", [pair | ours | {"score": 3.5, "id": "x"}])
    (tmp_path / "README.md").write_text("notes\n")
    splits = load_pairs(str(tmp_path))
    assert set(splits) == {"train", "test"}
    assert rows_of(splits["test"]) == [PAIRS[1] | ours] and splits["test"].unread == ("id", "score")


def test_folders_of_a_dataset_fill_subset(tmp_path: Path) -> None:
    """As HH-RLHF on the hub: a subset a folder, `b` without a test split, `a` with a column of its own.

    Folders of another kind and a broken file are told.
    """
    write_jsonl(tmp_path / "a" / "train.jsonl", [PAIRS[0] | {"subset": "overwritten", "note": "dropped"}])
    write_jsonl(tmp_path / "a" / "test.jsonl", [PAIRS[1]])
    write_jsonl(tmp_path / "b" / "train.jsonl", [PAIRS[2]])
    splits = load_pairs(str(tmp_path), data_dirs=["b", "a/"])
    assert rows_of(splits["train"]) == [PAIRS[2] | {"subset": "b"}, PAIRS[0] | {"subset": "a"}]
    assert rows_of(splits["test"]) == [PAIRS[1] | {"subset": "a"}] and splits["test"].unread == ("note",)
    assert splits["train"].place(1).endswith("a/train.jsonl, row 0")
    dialogue = [{"role": "user", "content": "Q"}]
    write_jsonl(tmp_path / "c" / "train.jsonl", [{"chosen": dialogue, "rejected": dialogue}])
    write_jsonl(tmp_path / "d" / "train.jsonl", [{"prompt": "Q: ", "chosen": "A", "rejected": "B"}])
    write_jsonl(tmp_path / "e" / "train.jsonl", [*PAIRS, {"chosen": 1}])
    for folder, message in {
        "c": r"train: expected the same columns in \['a', 'c'\], found text in \['chosen', 'rejected'\]",
        "d": r"the same columns in \['a', 'd'\], found \['prompt'\] in some",
        "e": r"/e/train\.jsonl, line 4",
    }.items():
        with pytest.raises(UserError, match=message):
            load_pairs(str(tmp_path), data_dirs=["a", folder])


@needs_real_data
def test_real_subsets_are_counted() -> None:
    names = ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
    splits = load_pairs(str(REAL_DATA / "hh-rlhf"), data_dirs=names)
    counts = {split: [pairs.rows["subset"][:].count(name) for name in names] for split, pairs in splits.items()}
    assert counts == {"train": [1482, 1522, 875, 2175], "test": [430, 430, 130, 272]}
    whole = load_pairs(str(REAL_DATA / "hh-rlhf"))
    assert {split: len(whole[split].rows) for split in whole} == {"train": 6054, "test": 1262}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("{folder}", {}, "doesn't contain any data files"),
        ("{folder}/gone.jsonl", {}, "dataset_name: .*nothing at .*gone.jsonl"),
        ("hf://datasets/nobody/nothing", {}, "hf://datasets/nobody/nothing"),
        ("nobody/nothing", {}, "nobody/nothing: .*local folder"),
        ("{folder}", {"data_dirs": ["gone"]}, "/gone"),
        ("{folder}/one/pairs.jsonl", {"data_dirs": ["a"]}, "dataset_data_dirs=.*no effect"),
        ("{folder}/one/pairs.jsonl", {"config_name": "en"}, "dataset_config='en' .*no effect"),
    ],
)
def test_what_is_not_there_or_has_no_effect_is_told(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "one" in name:
        write_jsonl(tmp_path / "one" / "pairs.jsonl", PAIRS)
    with pytest.raises(UserError, match=message):
        load_pairs(name.format(folder=tmp_path), **options)


def test_a_class_label_is_known_by_its_name(tmp_path: Path) -> None:
    text = Value("string")
    features = Features({"chosen": text, "rejected": text, "subset": ClassLabel(names=["easy", "hard"])})
    rows = {"chosen": ["a", "b"], "rejected": ["c", "d"], "subset": [1, 0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    assert load_pairs(str(tmp_path / "x.parquet"))["train"].rows["subset"][:] == ["hard", "easy"]
