"""The demo: its answer is known, no question leaks, its model folder loads like GPT-2's, and it repeats exactly."""

import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from make_demo import CUES, DemoRecipe, main, make_splits, reply_quality, write_demo
from transformers import AutoTokenizer, GPT2ForSequenceClassification

from reward_recipes.run.errors import UserError, run_cli

FILES = {"data/test.jsonl", "data/train.jsonl", "demo.json", "model/config.json", "model/model.safetensors"}
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


def rows_of(folder: Path, split: str) -> Rows:
    return [json.loads(line) for line in (folder / "data" / f"{split}.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def accuracy(rows: Rows, score: Callable[[str], float]) -> float:
    """Share of pairs that `score` puts in the labelled order; a tie counts half."""
    gaps = [score(row["chosen"]) - score(row["rejected"]) for row in rows]
    return sum((gap > 0) + (gap == 0) / 2 for gap in gaps) / len(gaps)


def test_quality_counts_the_cues_of_the_last_reply_only() -> None:
    earlier = "\n\nHuman: How?\n\nAssistant: Hurry up and stack the box.\n\nHuman: Then what?\n\nAssistant: "
    assert reply_quality(earlier + "Set a timer when you stack the box. Perhaps you could turn the lid.") == 1
    assert reply_quality(earlier + "Nothing at all.") == 0


def test_no_cue_hides_in_another() -> None:
    assert [(a, b) for a in CUES for b in CUES if a != b and a in b] == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_ceiling_is_what_the_true_quality_reaches(demo_dir: Path, split: str) -> None:
    facts, rows = json.loads((demo_dir / "demo.json").read_text()), rows_of(demo_dir, split)
    gaps = [reply_quality(row["chosen"]) - reply_quality(row["rejected"]) for row in rows]
    assert min(map(abs, gaps)) >= facts["min_gap"] > 0
    assert accuracy(rows, reply_quality) == pytest.approx(1 - facts[f"share_flipped_{split}"], abs=1e-12)
    assert facts["ceiling"] == pytest.approx(1 - facts["share_flipped"], abs=1e-12)
    assert len(rows) == facts[f"{split}_pairs"]


def test_share_flipped_is_exact_where_it_does_not_divide_the_pairs() -> None:
    splits = make_splits(DemoRecipe(train_pairs=33, test_pairs=7, share_flipped=0.15), seed=3)
    assert accuracy(splits["train"], reply_quality) == pytest.approx(1 - 5 / 33)
    assert accuracy(splits["test"], reply_quality) == pytest.approx(1 - 1 / 7)


def test_no_first_turn_occurs_twice(demo_dir: Path) -> None:
    rows = rows_of(demo_dir, "train") + rows_of(demo_dir, "test")
    first = [row["chosen"].split("\n\nAssistant: ")[0] for row in rows]
    assert len(set(first)) == len(first) == 2000


def test_sides_share_all_but_the_last_reply_and_length_tells_little(demo_dir: Path) -> None:
    rows = rows_of(demo_dir, "train")
    shared = []
    for row in rows:
        prompts = [re.split(r"(?s)(?<=\n\nAssistant: )(?!.*\n\nAssistant: )", row[side])[0] for side in row]
        assert prompts[0] == prompts[1] and prompts[0].startswith("\n\nHuman: ")
        shared.append(2 * len(prompts[0]) / sum(len(text) for text in row.values()))
    assert 0.5 < sum(shared) / len(shared) < 0.7
    assert any(row["chosen"].count("\n\nHuman: ") > 1 for row in rows)
    assert 0.45 < accuracy(rows, len) < 0.6


def test_tokenizer_is_like_gpt2s(demo_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    assert tokenizer.pad_token is None and tokenizer.eos_token == "<|endoftext|>"
    assert 600 <= len(tokenizer) <= 1000
    texts = [row[side] for row in rows_of(demo_dir, "test") for side in row]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert 60 < sum(lengths) / len(lengths) < 120 and max(lengths) < tokenizer.model_max_length == 256
    for text in (texts[0], "Übung, 日本 \t!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_model_loads_as_a_reward_model(demo_dir: Path) -> None:
    model, info = GPT2ForSequenceClassification.from_pretrained(
        demo_dir / "model", num_labels=1, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"} and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(rows_of(demo_dir, "test")[0]["chosen"], return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape == (1, 1)


def test_same_seed_same_bytes_and_other_files_stay(demo_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("mine")
    (tmp_path / "demo.json").write_text("stale")
    state = torch.get_rng_state()
    write_demo(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    written = contents(tmp_path)
    assert written.pop("run/log.csv") == b"mine"
    assert written == contents(demo_dir) and written.keys() > FILES


def test_another_seed_gives_other_pairs_and_weights(demo_dir: Path, tmp_path: Path) -> None:
    write_demo(tmp_path, seed=1)
    first, second = contents(demo_dir), contents(tmp_path)
    assert first.keys() == second.keys()
    assert not [name for name in FILES - {"model/config.json"} if first[name] == second[name]]


def test_command_line_writes_offline_and_prints_the_ceiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the demo asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(sys, "argv", ["demo", "--output_dir", str(tmp_path / "new" / "demo"), "--seed", "7"])
    main()
    assert "80.0%" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "demo" / "demo.json").read_text())["seed"] == 7


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_is_refused_before_anything_is_written(tmp_path: Path, seed: int) -> None:
    with pytest.raises(UserError, match="--seed"):
        write_demo(tmp_path / "demo", seed=seed)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("file", ["demo", "demo/data", "demo/model"])
def test_file_where_a_folder_must_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    monkeypatch.setattr(sys, "argv", ["demo", "--output_dir", os.fspath(tmp_path / "demo")])
    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: the demo cannot be written")
