"""What becomes of each pair: its ids, why it is dropped, how it is cut, and on which side of the split it lands."""

from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import as_pairs, hh_pairs, write_jsonl
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.data import PreparedData, prepare_data
from reward_recipes.pairs import (
    KnownBy,
    Status,
    common_prefix_length,
    encode_splits,
    load_pairs,
    load_tokenizer,
)
from reward_recipes.pairs.prompts import hash64, split_by_prompt
from reward_recipes.run import UserError


@pytest.fixture(scope="module")
def gpt2(gpt2_dir: Path) -> PreTrainedTokenizerBase:
    """EOS is 0; `!`, `"`, `#`, `$`, ... are 1, 2, 3, 4, ..."""
    return load_tokenizer(str(gpt2_dir))


@pytest.fixture(scope="module")
def chat(chat_dir: Path) -> PreTrainedTokenizerBase:
    """EOS is 2, pad 3; the template is ChatML."""
    return load_tokenizer(str(chat_dir))


def encode(
    rows: list[Any], tokenizer: PreTrainedTokenizerBase, length: int = 100, overlong: str = "drop", subsets: str = ""
) -> Dataset:
    """Rows as they are, or as (chosen, rejected); subsets are named by a letter each."""
    rows = [{"chosen": row[0], "rejected": row[1]} if isinstance(row, tuple) else row for row in rows]
    return encode_splits({"": as_pairs(rows)}, tokenizer, length, overlong, list(subsets))[""]


def turns(*contents: str | None) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_ids_prefix_lengths_and_row_of_a_pair(gpt2: PreTrainedTokenizerBase) -> None:
    first, second = encode([("!!#", "!!"), ('"', "$$")], gpt2)
    assert (first["chosen_ids"], first["rejected_ids"]) == ([1, 1, 3, 0], [1, 1, 0])
    assert (first["prefix"], first["chosen_length"], first["rejected_length"], first["row"]) == (2, 4, 3, 0)
    assert (second["chosen_ids"], second["rejected_ids"]) == ([2, 0], [4, 4, 0])
    assert (second["prefix"], second["status"], second["row"], second["subset"]) == (0, Status.KEPT, 1, -1)
    texts = {"chosen": "!", "rejected": "#"}
    rows = [texts | {"margin": 1, "subset": "b"}, texts | {"margin": 2, "subset": "a", "rejected": None}]
    named = encode(rows, gpt2, subsets="ab")
    assert named["margin"][:] == [1.0, 2.0] and named["subset"][:] == [1, 0] and "margin" not in first


@settings(deadline=None, derandomize=True)
@given(*[st.lists(st.integers(1, 2), max_size=6)] * 2)
def test_common_prefix_ends_before_eos(left: list[int], right: list[int]) -> None:
    """EOS is never a part of it, so that a score is left to read on each side."""
    expected = len(commonprefix([left, right]))  # noqa: RUF071 (item by item is what is wanted)
    assert common_prefix_length(np.array([*left, 0]), np.array([*right, 0])) == expected


def test_dropped_pairs_are_counted_beside_kept_ones(gpt2: PreTrainedTokenizerBase) -> None:
    """Every reason in one batch, at 4 tokens: three and EOS fit."""
    expected = {
        ("!!!", "#"): (Status.KEPT, 4),
        (None, "#"): (Status.BLANK, 0),
        ("!", " \n\t"): (Status.BLANK, 0),
        ("", "#"): (Status.BLANK, 0),
        ("!#", "!#"): (Status.IDENTICAL, 3),
        ("!#<|endoftext|>", "!#"): (Status.IDENTICAL, 3),  # alike once the literal EOS is off
        ("!!!!", "#"): (Status.OVERLONG, 5),
        ("#", "!!!!!!!"): (Status.OVERLONG, 2),
        ("!!!!!!!", "!!!!!!!"): (Status.IDENTICAL, 8),
    }
    encoded = encode(list(expected), gpt2, 4)
    assert list(zip(encoded["status"], encoded["chosen_length"], strict=True)) == list(expected.values())
    assert [len(ids) for ids in encoded["chosen_ids"]] == [4, 0, 0, 0, 0, 0, 0, 0, 0]
    assert encoded["row"][:] == list(range(9))


def test_keep_end_cuts_both_sides_alike(gpt2: PreTrainedTokenizerBase) -> None:
    """At 5 tokens: `!"#$%` and EOS are one too many, so one goes from both sides, and the prefix stays aligned."""
    rows = [
        ('!"#$%', '!"#&'),
        ('!"#&', '!"#$%'),
        ("!!!!!!!!", "!#"),  # 9 and 3 tokens: nothing of the second would be left
        ("!!!!!#", "!#"),  # 7 and 3 tokens: only EOS would be left
        ('"!!!!!', "#!!!!!"),  # differ in what is cut off
        ('"!!!!#', '"!!!!$'),
    ]
    encoded = encode(rows, gpt2, 5, "keep_end")
    assert (encoded[0]["chosen_ids"], encoded[0]["rejected_ids"]) == ([2, 3, 4, 5, 0], [2, 3, 6, 0])
    assert (encoded[1]["chosen_ids"], encoded[1]["rejected_ids"]) == ([2, 3, 6, 0], [2, 3, 4, 5, 0])
    assert [(encoded[row]["prefix"], encoded[row]["chosen_length"]) for row in (0, 1)] == [(2, 6), (2, 5)]
    cut = Status.CUT
    assert encoded["status"][:] == [cut, cut, Status.OVERLONG, Status.OVERLONG, Status.IDENTICAL_AFTER_CUT, cut]
    assert (encoded[5]["chosen_ids"], encoded[5]["rejected_ids"]) == ([1, 1, 1, 3, 0], [1, 1, 1, 4, 0])
    assert encoded[4]["chosen_ids"] == [] and encoded[4]["chosen_length"] == 7


def test_messages_without_text_are_missing(chat: PreTrainedTokenizerBase) -> None:
    good = {"prompt": "Q", "chosen": turns("Q", "B"), "rejected": turns("Q", "A")}
    sides = [turns("Q", " "), turns("Q", None), [], None]
    rows = [good, *(good | {"chosen": side} for side in sides), good | {"prompt": None}]
    assert encode(rows, chat)["status"][:] == [Status.KEPT, *[Status.BLANK] * 5]


def test_first_turn_identifies_a_dialogue(gpt2: PreTrainedTokenizerBase, chat: PreTrainedTokenizerBase) -> None:
    """In the HH format, and in others where the prompt is given; test_known_prompts.py has those where it is not."""

    def prompt_id(chosen: str, rejected: str, **more: str) -> int:
        return encode([{"chosen": chosen, "rejected": rejected, **more}], gpt2)[0]["prompt_id"]

    turn = "\n\nHuman: Why?\n\nAssistant:"
    later = f"{turn} C\n\nHuman: And?\n\nAssistant:"
    same = {prompt_id(f"{turn} A", f"{turn} B"), prompt_id(f"{later} D", f"{later} E")}
    assert same == {hash64(b"\n\nHuman: Why?")}  # by which recorded runs drew their validation pairs
    same |= {prompt_id(" F", " G", prompt=turn), prompt_id(" F", " G", prompt=later)}
    assert len(same) == 1 and prompt_id(f"{turn.replace('Why', 'How')} A", f"{turn} B") not in same
    whole = {"chosen": f"{later} Because.", "rejected": f"{later} No."}
    parts = {"prompt": later, "chosen": " Because.", "rejected": " No."}
    found, other = encode([whole], gpt2)[0], encode([parts], gpt2)[0]
    assert other["known_by"] == KnownBy.COLUMN and found == other | {"known_by": KnownBy.HH_LAYOUT}
    assert prompt_id("A", "B", prompt="Q: why? ") == prompt_id(f"C{turn}D", "E", prompt="Q:  why?")
    messages = {"chosen": turns(" Q\n", "A"), "rejected": turns(" Q\n", "B")}
    assert encode([messages], chat)[0]["prompt_id"] == hash64(b" Q\n")


@settings(deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.integers(0, 30), min_size=1, max_size=99), fraction=st.floats(0, 0.9), seed=st.integers(0, 9)
)
def test_split_by_prompt_keeps_a_prompt_on_one_side(prompts: list[int], fraction: float, seed: int) -> None:
    """And holds out the share that was asked for, as far as whole prompts fill it: none that is left would fit."""
    ids = np.array(prompts)
    kept, held_out = split_by_prompt(ids, fraction, seed)
    assert sorted([*kept, *held_out]) == list(range(len(ids)))
    assert not set(ids[kept]) & set(ids[held_out])
    room = round(fraction * len(ids)) - len(held_out)
    assert room >= 0 and all(prompts.count(prompt) > room for prompt in ids[kept])
    assert np.array_equal(held_out, split_by_prompt(ids, fraction, seed)[1])


def test_split_by_prompt_draws_the_exact_share_at_random() -> None:
    """The study's 160,800 pairs, up to 20 on a prompt: 10% held out leave 144,720, from all over the source."""
    sizes = np.minimum(np.random.default_rng(0).geometric(0.8, 160_800), 20)
    prompts = np.repeat(np.arange(len(sizes)), sizes)[:160_800]
    kept, held_out = split_by_prompt(prompts, 0.1, seed=1)
    assert (len(kept), len(held_out)) == (144_720, 16_080)
    assert held_out.mean() == pytest.approx(80_400, rel=0.02) and len(np.unique(np.diff(held_out))) > 20
    assert not np.array_equal(held_out, split_by_prompt(prompts, 0.1, seed=2)[1])


def test_tokenised_pairs_are_cached_until_something_changes(
    gpt2_dir: Path, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", hh_pairs(5))

    def encoded(folder: Path = gpt2_dir, length: int = 50, overlong: str = "drop", **tokens: str) -> int:
        pairs = load_pairs(str(path))
        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_special_tokens(tokens)
        encode_splits(pairs, tokenizer, length, overlong, [])
        encode_splits(pairs, tokenizer, length, overlong, [])  # a tokenizer that was called is no other one
        return len(list(Path(pairs["train"].rows.cache_files[0]["filename"]).parent.glob("cache-*.arrow")))

    assert [encoded(), encoded(), encoded()] == [1, 1, 1]
    changes = [{"length": 60}, {"overlong": "keep_end"}, {"folder": llama_dir}, {"eos_token": "!"}, {"pad_token": "!"}]
    assert [encoded(**change) for change in changes] == [2, 3, 4, 5, 6]
    monkeypatch.setattr("reward_recipes.pairs.encode.ENCODING", 0)
    assert encoded() == 7
    write_jsonl(path, hh_pairs(6))
    assert encoded() == 1  # changed data are another data set


def prepare(
    source: Path, tokenizer: PreTrainedTokenizerBase, script: dict[str, str] | None = None, **options: object
) -> PreparedData:
    options = {"output_dir": "unused", "bf16": False, "max_length": 100} | options
    return prepare_data(ScriptArguments(str(source), **script or {}), RewardRecipeConfig(**options), tokenizer)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training pairs, of which 6 and 7 share a first turn and 2 has blank text; and 7 test pairs."""
    train = hh_pairs(40)
    train[2] = train[2] | {"chosen": " "}
    train[7] = train[6] | {"rejected": train[6]["rejected"] + " Or not."}
    folder = tmp_path_factory.mktemp("source")
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", hh_pairs(7, start=100))
    return folder


def test_test_split_evaluates_where_nothing_is_held_out(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    data = prepare(source, gpt2)
    assert {name: len(dataset) for name, dataset in data.evaluation.items()} == {"test": 7}
    assert (len(data.train), len(data.test), data.audit["train"]["pairs_read"]) == (39, 7, 40)
    assert 2 not in data.train["row"][:] and data.subsets == []
    alone = prepare(source / "train.jsonl", gpt2, eval_strategy="no")  # which needs no other split
    assert (len(alone.train), alone.evaluation, alone.test) == (39, {}, None)
    parallel = prepare(source, gpt2, dataset_num_proc=2, max_length=101)  # a length that no cache holds
    assert parallel.train.to_list() == data.train.to_list()


def test_validation_is_held_out_of_the_usable_pairs(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    data = prepare(source, gpt2, validation_fraction=0.25)
    assert (len(data.train), len(data.evaluation["validation"]), len(data.test)) == (29, 10, 7)
    assert not set(data.train["prompt_id"]) & set(data.evaluation["validation"]["prompt_id"])
    assert list(data.evaluation) == ["validation"] and "pairs_read" not in data.audit["validation"]


def test_a_smaller_draw_is_a_part_of_a_larger_one(source: Path, gpt2: PreTrainedTokenizerBase) -> None:
    """Of 29 pairs; the order stays that of the source, and what evaluates and tests stays what it was."""

    def drawn(**options: int) -> tuple[list[int], list[int], list[int]]:
        data = prepare(source, gpt2, validation_fraction=0.25, eval_splits=["validation", "test"], **options)
        assert list(data.evaluation) == ["validation", "test"] and len(data.test) == 7
        rows = [part["row"][:] for part in (data.train, *data.evaluation.values())]
        assert all(sorted(part) == part for part in rows)
        return tuple(rows)

    train, validation, test = drawn()
    for size, more in ((3, 28), (28, 1000)):
        smaller, larger = drawn(max_train_samples=size), drawn(max_train_samples=more)
        assert len(smaller[0]) == size and set(smaller[0]) < set(larger[0]) <= set(train)
        assert smaller[1:] == larger[1:] == (validation, test)
    five, six = drawn(max_eval_samples=5), drawn(max_eval_samples=6)
    assert five[0] == six[0] == train
    assert all(len(part) == 5 and set(part) < set(whole) for part, whole in zip(five[1:], six[1:], strict=True))
    draws = [drawn(max_train_samples=10, seed=seed)[0] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and all(max(draw) > 20 for draw in draws)  # no mere beginning


def test_a_validation_split_is_used_by_default(tmp_path: Path, gpt2: PreTrainedTokenizerBase) -> None:
    """Unless the recipe names another; a split that is not used is not judged."""
    for start, split in enumerate(("train", "test")):
        write_jsonl(tmp_path / f"{split}.jsonl", hh_pairs(3, 10 * start))
    write_jsonl(tmp_path / "validation.jsonl", [{"chosen": "!", "rejected": "!"}])
    assert set(prepare(tmp_path, gpt2, eval_splits=["test"]).audit) == {"train", "test"}
    with pytest.raises(UserError, match=r"validation: .*'identical': 1"):
        prepare(tmp_path, gpt2)
    with pytest.raises(UserError, match="set validation_fraction to 0"):
        prepare(tmp_path, gpt2, validation_fraction=0.25)
    write_jsonl(tmp_path / "validation.jsonl", hh_pairs(2, start=200))
    assert list(prepare(tmp_path, gpt2).evaluation) == ["validation"]
    assert list(prepare(tmp_path, gpt2, eval_splits=["validation", "test"]).evaluation) == ["validation", "test"]


def test_subsets_are_numbered_alike_in_every_split(tmp_path: Path, gpt2: PreTrainedTokenizerBase) -> None:
    for index, name in enumerate(("b", "a")):
        write_jsonl(tmp_path / name / "train.jsonl", hh_pairs(2, start=10 * index))
        write_jsonl(tmp_path / name / "test.jsonl", hh_pairs(1, start=50 + index))
    data = prepare(tmp_path, gpt2, dataset_data_dirs=["b", "a"])
    assert data.subsets == ["a", "b"]
    assert data.train["subset"][:] == [1, 1, 0, 0] and data.test["subset"][:] == [1, 0]


def test_data_that_cannot_be_trained_on_says_why(source: Path, tmp_path: Path, gpt2: PreTrainedTokenizerBase) -> None:
    bad = write_jsonl(tmp_path / "pairs.jsonl", [{"good": "a", "bad": "b"}])
    for folder, options, message in [
        (source, {"max_length": 5}, r"split train: .*'blank': 1, 'overlong': 39"),
        (source, {"eval_splits": ["dev"]}, r"'dev', found \['test', 'train'\]"),
        (source, {"script": {"dataset_train_split": "training"}}, r"'training', found \['test', 'train'\]"),
        (source, {"script": {"dataset_test_split": "final"}}, "'final'"),
        (source, {"validation_fraction": 0.01}, "found 0 that can be held out"),
        (bad, {}, r"columns .*\['bad', 'good'\]"),  # before the test split that it lacks
    ]:
        with pytest.raises(UserError, match=message):
            prepare(folder, gpt2, **options)


def test_error_of_a_worker_process_reaches_the_user(tmp_path: Path, gpt2: PreTrainedTokenizerBase) -> None:
    rows = [{"chosen": turns("Q", str(i)), "rejected": turns("Q", "B")} for i in range(4)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError, match="chat_template_path"):
        prepare(path, gpt2, eval_strategy="no", dataset_num_proc=2)
