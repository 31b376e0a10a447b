"""The audit's figures, counted by hand."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REAL_DATA, as_pairs, needs_real_data, write_jsonl
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes import audit as door
from reward_recipes.config import RewardRecipeConfig
from reward_recipes.data import prepare_data
from reward_recipes.pairs import audit, encode_splits, format_audit, load_tokenizer


@pytest.fixture(scope="module")
def gpt2(gpt2_dir: Path) -> PreTrainedTokenizerBase:
    """One token a character for the texts here; EOS is one more."""
    return load_tokenizer(str(gpt2_dir))


@pytest.fixture
def counted(gpt2: PreTrainedTokenizerBase) -> Callable[..., dict[str, Any]]:
    """The audit of pairs given as (chosen, rejected)."""

    def count(pairs: list[tuple[str | None, str]], max_length: int = 100, overlong: str = "drop") -> dict[str, Any]:
        rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
        encoded = encode_splits({"train": as_pairs(rows)}, gpt2, max_length, overlong, [])["train"]
        return audit({"train": encoded}, encoded, "train", {})["train"]

    return count


def test_every_pair_is_counted_under_one_reason(counted: Callable[..., dict[str, Any]]) -> None:
    """At 5 tokens, four characters fit; lengths of the six pairs with text: 3 3, 4 2, 3 3, 3 3, 6 3, 6 6."""
    pairs = [("!!", "!#"), ("!!!", "#"), ("##", "##"), (None, "!"), (" ", "!"), ("!!", "!!")]
    report = counted([*pairs, ("!!!!!", "##"), ("#####", "!!!!!")], max_length=5)
    dropped = [report[name] for name in ("missing_or_blank", "identical", "identical_after_cut", "overlong_dropped")]
    assert dropped == [2, 2, 0, 2]
    assert (report["pairs_read"], report["pairs_used"], report["overlong_cut"]) == (8, 2, 0)
    assert report["tokens_mean"] == pytest.approx((3 + 3 + 4 + 2 + 3 + 3 + 3 + 3 + 6 + 3 + 6 + 6) / 12)
    assert report["tokens_max"] == 6


def test_duplicates_and_contradictions(counted: Callable[..., dict[str, Any]]) -> None:
    """`! #` stands three times (two repeats) and once the other way round; `$ %` both ways; `& &` is neither."""
    report = counted([tuple(pair) for pair in ("!#", "!#", "#!", "!#", "$%", "%$", "&&", "&&", "!%")])
    assert (report["exact_duplicates"], report["contradictions"], report["identical"]) == (2, 2, 2)
    assert report["pairs_used"] == 7


def test_shares_leave_out_what_is_not_trained_on(counted: Callable[..., dict[str, Any]]) -> None:
    """Longer chosen: of five used pairs one is of equal lengths; of the other four, three have the longer chosen text.

    Common prefix: `!!#` and `!!$$` share 2 tokens of 4 + 5, `!` and `#` none of 2 + 2; and after the cut to 6 tokens,
    `!!!!#$` and `!!!!%` (7 and 6) lose one each, so that 3 of 6 + 5 are shared, then 1 of 3 + 3.
    """
    pairs = [("!!", "#"), ("!!!", "#"), ("!!", "$"), ("!", "##"), ("!!", "##"), ("!!!!!!!!!", "#"), (None, "#")]
    assert counted(pairs, max_length=6)["longer_chosen"] == 0.75
    pairs = [("!!#", "!!$$"), ("!", "#"), ("!" * 50, "!" * 60)]
    assert counted(pairs, max_length=20)["common_prefix"] == pytest.approx(2 * 2 / 13)
    pairs = [("!!!!#$", "!!!!%"), ("!#", "!$"), ("#!!!!!!", "$!!!!!!")]
    report = counted(pairs, max_length=6, overlong="keep_end")
    assert (report["overlong_cut"], report["identical_after_cut"], report["pairs_used"]) == (1, 1, 2)
    assert report["common_prefix"] == pytest.approx((2 * 3 + 2 * 1) / (6 + 5 + 3 + 3))
    nothing = counted([(None, "!"), (None, "#")])
    assert [nothing[name] for name in ("longer_chosen", "common_prefix", "tokens_mean", "tokens_max")] == [None] * 4


def turns(first: str, *replies: str) -> dict[str, str]:
    return dict(zip(("chosen", "rejected"), (f"\n\nHuman: {first}\n\nAssistant: {r}" for r in replies), strict=True))


def test_first_turns_shared_with_training_are_counted(tmp_path: Path, gpt2: PreTrainedTokenizerBase) -> None:
    """Two test pairs open as training pairs do. One opens as a dropped training pair, one is itself dropped."""
    train = [turns(*texts) for texts in ("A12", "B12", "C11", "D34", "E56")]
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "test.jsonl", [turns(*texts) for texts in ("B78", "B98", "C12", "Z12", "A33")])
    options = {"output_dir": "unused", "bf16": False, "max_length": 100}
    script = ScriptArguments(str(tmp_path))
    report = prepare_data(script, RewardRecipeConfig(**options), gpt2).audit
    assert report["test"]["first_turn_in_train"] == 2 and "first_turn_in_train" not in report["train"]
    assert report["train"]["pairs_trained_on"] == 4
    shared = set()
    for seed in (0, 2):  # holds out another training pair, or B's
        config = RewardRecipeConfig(**options, validation_fraction=0.25, seed=seed)
        data = prepare_data(script, config, gpt2)
        report = data.audit
        assert report["validation"] == {"pairs_used": 1, "first_turn_in_train": 0}
        assert (report["train"]["pairs_used"], report["train"]["pairs_trained_on"]) == (4, 3)
        assert report["test"]["first_turn_in_train"] == (2 if 1 in data.train["row"][:] else 0)
        shared.add(report["test"]["first_turn_in_train"])
    assert shared == {0, 2} and json.loads(json.dumps(report)) == report
    config = RewardRecipeConfig(**options, max_eval_samples=1)  # the split is scored whole in the end
    assert prepare_data(script, config, gpt2).audit["test"]["first_turn_in_train"] == 2


def test_table_has_a_line_a_measure_that_is_not_0_and_a_column_a_split() -> None:
    report = {
        "train": {"pairs_read": 12345, "longer_chosen": 0.5, "tokens_mean": 171.25},
        "test": {"pairs_read": 7, "longer_chosen": None, "first_turn_in_train": 0},
    }
    assert [line.split() for line in format_audit(report).splitlines()] == [
        ["data", "audit", "train", "test"],
        ["pairs_read", "12,345", "7"],
        ["longer_chosen", "50.0%", "-"],
        ["tokens_mean", "171.2", "-"],
        ["none", "of", "these", "first_turn_in_train"],
    ]


def test_command_prints_the_table_of_the_splits_that_are_there(
    gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, which has one split; then a validation split as well, which shares a first turn with it."""
    path = write_jsonl(tmp_path / "pairs.jsonl", [turns("A", "1", "2"), turns("B", "1", "1")])
    options = ["--dataset_name", str(path), "--model_name_or_path", str(gpt2_dir), "--max_length", "100"]
    monkeypatch.setattr("sys.argv", ["audit", *options])
    door.main()
    table = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert (table["pairs_read"], table["pairs_used"], table["identical"]) == ("2", "1", "1")
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "pairs" / f"{split}.jsonl", [turns("A", "1", "2")])
    monkeypatch.setattr("sys.argv", ["audit", *options, "--dataset_name", str(tmp_path / "pairs")])
    door.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["data", "audit", "train", "validation"] and ["first_turn_in_train", "-", "1"] in rows


@needs_real_data
def test_real_pairs_agree_with_a_plain_count() -> None:
    """Helpful-base, counted afresh from the file. Field notes: 70% common prefix, longer chosen in 61%, mean 191."""
    tokenizer = load_tokenizer(str(REAL_DATA / "gpt2-tokenizer"))
    config = RewardRecipeConfig(output_dir="unused", bf16=False, max_length=512, dataset_data_dirs=["helpful-base"])
    data = prepare_data(ScriptArguments(str(REAL_DATA / "hh-rlhf")), config, tokenizer)
    assert all(ids.index(50256) == len(ids) - 1 and 50257 not in ids for ids in data.test["chosen_ids"])
    report = data.audit
    with gzip.open(REAL_DATA / "hh-rlhf" / "helpful-base" / "train.jsonl.gz") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    lengths = [len(ids) + 1 for ids in tokenizer(texts, verbose=False)["input_ids"]]
    train = report["train"]
    assert train["pairs_read"] == len(rows) == 1522 and train["tokens_max"] == max(lengths)
    assert train["overlong_dropped"] == sum(max(pair) > 512 for pair in zip(lengths[::2], lengths[1::2], strict=True))
    assert train["tokens_mean"] == pytest.approx(sum(lengths) / len(lengths)) == pytest.approx(191, abs=2)
    assert train["common_prefix"] == pytest.approx(0.70, abs=0.01)
    assert train["longer_chosen"] == pytest.approx(0.61, abs=0.01)
    assert report["test"]["first_turn_in_train"] == 0
