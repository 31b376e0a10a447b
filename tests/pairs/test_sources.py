"""Pairs are read from files, folders and folders of folders through one path; what is missing is told with a way out.

What a single file may hold is in test_hostile_data.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REAL_DATA, as_pairs, hh_pairs, needs_real_data, write_jsonl
from datasets import ClassLabel, Dataset, Features, Value

from reward_recipes.pairs import Pairs, Status, encode_splits, load_pairs, load_tokenizer
from reward_recipes.run import UserError

PAIRS = hh_pairs(3)


def messages(*contents: object) -> list[dict[str, object]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


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
    """As HH-RLHF on the hub: a subset a folder, `b` without a test split, `a` with a column of its own."""
    write_jsonl(tmp_path / "a" / "train.jsonl", [PAIRS[0] | {"subset": "overwritten", "note": "dropped"}])
    write_jsonl(tmp_path / "a" / "test.jsonl", [PAIRS[1]])
    write_jsonl(tmp_path / "b" / "train.jsonl", [PAIRS[2]])
    splits = load_pairs(str(tmp_path), data_dirs=["b", "a/"])
    assert rows_of(splits["train"]) == [PAIRS[2] | {"subset": "b"}, PAIRS[0] | {"subset": "a"}]
    assert rows_of(splits["test"]) == [PAIRS[1] | {"subset": "a"}] and splits["test"].unread == ("note",)
    assert splits["train"].place(1).endswith("a/train.jsonl, row 0")
    write_jsonl(tmp_path / "c" / "train.jsonl", [{"chosen": messages("Q", "A"), "rejected": messages("Q", "B")}])
    with pytest.raises(UserError, match=r"train: expected the same columns in \['a', 'c'\]"):
        load_pairs(str(tmp_path), data_dirs=["a", "c"])
    write_jsonl(tmp_path / "d" / "train.jsonl", [{"prompt": "Q: ", "chosen": "A", "rejected": "B"}])
    with pytest.raises(UserError, match=r"the same columns in \['a', 'd'\], found \['prompt'\] in some"):
        load_pairs(str(tmp_path), data_dirs=["a", "d"])


@needs_real_data
def test_real_subsets_are_counted() -> None:
    names = ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
    splits = load_pairs(str(REAL_DATA / "hh-rlhf"), data_dirs=names)
    counts = {split: {name: splits[split].rows["subset"][:].count(name) for name in names} for split in splits}
    assert list(counts["train"].values()) == [1482, 1522, 875, 2175]
    assert list(counts["test"].values()) == [430, 430, 130, 272]
    whole = load_pairs(str(REAL_DATA / "hh-rlhf"))
    assert {split: len(whole[split].rows) for split in whole} == {"train": 6054, "test": 1262}


def test_broken_file_of_a_folder_is_found_among_sound_ones(tmp_path: Path) -> None:
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"about": {"lines": 3}}, indent=1))
    write_jsonl(tmp_path / "a" / "train.jsonl", PAIRS)
    with write_jsonl(tmp_path / "b" / "train.jsonl", PAIRS).open("a") as file:
        file.write('{"chosen": "cut off\n')
    for folders in (None, ["a", "b"]):
        with pytest.raises(UserError, match=re.escape(f"{tmp_path}/b/train.jsonl, line 4")):
            load_pairs(str(tmp_path), data_dirs=folders)


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


def test_messages_whose_keys_differ_are_still_messages(chat_dir: Path, tmp_path: Path) -> None:
    named = [{"role": "user", "content": "Q", "name": "Ann"}, {"role": "assistant", "content": "A"}]
    rows = [{"chosen": chosen, "rejected": messages("Q", "B")} for chosen in (named, messages("Q", None), None)]
    pairs = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", rows)))
    encoded = encode_splits(pairs, load_tokenizer(str(chat_dir)), 64, "drop", [])["train"]
    assert encoded["status"][:] == [Status.KEPT, Status.BLANK, Status.BLANK] and rows_of(pairs["train"]) == rows


def test_a_prompt_that_a_side_repeats_is_not_doubled(gpt2_dir: Path) -> None:
    """In any row, with other white space at the seam; but a word that goes on behind it is not the prompt."""
    tokenizer = load_tokenizer(str(gpt2_dir))
    rows = [{"prompt": "A: ", "chosen": side, "rejected": "A:z"} for side in ("x", "A: x", " A:x", "A: A: x")]
    rows += [{"prompt": "Yes", "chosen": side, "rejected": "."} for side in ("", "terday", " no")]
    encoded = encode_splits({"": as_pairs(rows)}, tokenizer, 64, "drop", [])[""]
    texts = [tokenizer.decode(ids[:-1]) for ids in encoded["chosen_ids"]]
    assert texts == ["A: x", "A: x", " A:x", "A: A: x", "", "Yesterday", "Yes no"]


def test_no_rows_are_refused(tmp_path: Path) -> None:
    Dataset.from_list(PAIRS).select([]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"none\.parquet: .*no rows"):
        load_pairs(str(tmp_path / "none.parquet"))


def test_a_class_label_is_known_by_its_name(tmp_path: Path) -> None:
    text = Value("string")
    features = Features({"chosen": text, "rejected": text, "subset": ClassLabel(names=["easy", "hard"])})
    rows = {"chosen": ["a", "b"], "rejected": ["c", "d"], "subset": [1, 0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    assert load_pairs(str(tmp_path / "x.parquet"))["train"].rows["subset"][:] == ["hard", "easy"]
