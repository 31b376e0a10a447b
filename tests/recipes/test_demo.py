"""The demo: its answer is known, no question leaks, its files load like GPT-2's and repeat exactly, and it all runs."""

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import rlhf
from conftest import save_reward_model
from make_demo import CUES, main, make_splits, reply_quality, write_demo
from transformers import AutoTokenizer, GPT2ForSequenceClassification

Rows = list[dict[str, str]]
DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo"


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


def rows_of(folder: Path, split: str) -> Rows:
    return [json.loads(line) for line in (folder / "data" / f"{split}.jsonl").read_text().splitlines()]


def accuracy(rows: Rows, score: Callable[[str], float]) -> float:
    """Share of pairs that `score` puts in the labelled order; a tie counts half."""
    gaps = [score(row["chosen"]) - score(row["rejected"]) for row in rows]
    return sum((gap > 0) + (gap == 0) / 2 for gap in gaps) / len(gaps)


def test_quality_counts_the_cues_of_the_last_reply_only_and_no_cue_hides_in_another() -> None:
    earlier = "\n\nHuman: How?\n\nAssistant: Hurry up and stack the box.\n\nHuman: Then what?\n\nAssistant: "
    assert reply_quality(earlier + "Set a timer when you stack the box. Perhaps you could turn the lid.") == 1
    assert reply_quality(earlier + "Nothing at all.") == 0
    assert reply_quality(earlier + "Set a timer when you Set a timer when you sit.") == 2
    assert [(a, b) for a in CUES for b in CUES if a != b and a in b] == []


def test_ceiling_is_what_the_true_quality_reaches_and_no_first_turn_occurs_twice(demo_dir: Path) -> None:
    facts, splits = json.loads((demo_dir / "demo.json").read_text()), {}
    for split in ("train", "test"):
        splits[split] = rows = rows_of(demo_dir, split)
        gaps = [reply_quality(row["chosen"]) - reply_quality(row["rejected"]) for row in rows]
        assert min(map(abs, gaps)) >= facts["min_gap"] > 0 and len(rows) == facts[f"{split}_pairs"]
        assert accuracy(rows, reply_quality) == pytest.approx(1 - facts[f"share_flipped_{split}"], abs=1e-12)
        assert 0.45 < accuracy(rows, len) < 0.6  # length tells little
        for row in rows:
            prompts = ["".join(text.rpartition("\n\nAssistant: ")[:2]) for text in row.values()]
            assert prompts[0] == prompts[1] and prompts[0].startswith("\n\nHuman: ")
    assert facts["ceiling"] == pytest.approx(0.8, abs=1e-12)
    first = [row["chosen"].split("\n\nAssistant: ")[0] for rows in splits.values() for row in rows]
    assert len(set(first)) == len(first) == 2000


def test_model_and_tokenizer_load_like_gpt2s(demo_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    assert tokenizer.pad_token is None and tokenizer.eos_token == "<|endoftext|>"
    texts = [text for row in rows_of(demo_dir, "test") for text in row.values()]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert 60 < sum(lengths) / len(lengths) < 120 and max(lengths) < tokenizer.model_max_length == 256
    for text in (texts[0], "Übung, 日本 \t!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    options = {"num_labels": 1, "output_loading_info": True}
    model, info = GPT2ForSequenceClassification.from_pretrained(demo_dir / "model", **options)
    assert set(info["missing_keys"]) == {"score.weight"} and not info["unexpected_keys"]
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id


def test_a_seed_gives_the_same_files_offline_and_others_stay(
    demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    (tmp_path / "log.csv").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["demo", "--output_dir", str(tmp_path)])
    main()
    assert "80.0%" in capsys.readouterr().out and (tmp_path / "log.csv").read_text() == "mine"
    for name in ("data/test.jsonl", "data/train.jsonl", "demo.json", "model/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (demo_dir / name).read_bytes()
    assert make_splits(7)["test"][0] not in make_splits(0)["test"]


def test_a_policy_starts_supervised_and_its_true_quality_is_measured(
    demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rlhf, "STEPS", 1)
    shutil.copytree(demo_dir, "outputs/demo")
    save_reward_model(demo_dir / "model", Path("outputs/demo/run"), max_length=256, overlong="drop")
    short = {"max_steps": 1, "max_completion_length": 4, "sample_prompts": 2, "sample_steps": 1, "report_to": "none"}
    words = [text for name, value in (short | {"use_cpu": True}).items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["rlhf.py", "rloo", "--config", str(DEMO / "rloo.yaml"), *words])
    rlhf.main()
    before, after = (folder / "model.safetensors" for folder in (demo_dir / "model", rlhf.SUPERVISED))
    assert before.read_bytes() != after.read_bytes()
    assert pd.read_csv("outputs/demo/rloo/rloo_progress.csv")["sample_true_quality"].tolist() == [0, 0]
    assert rlhf.true_quality("Assistant: Hurry up and", " Set a timer when you sit. Perhaps you could stand.") == 1


def test_the_notebook_runs_and_holds_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "path", [*sys.path])
    notebook = json.loads((DEMO / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    for cell in cells:
        source = "".join(cell["source"])
        exec(source.replace('"--max_steps", "100"', '"--max_steps", "2"'), names)
    assert len(names["picked"]) == 50 and (tmp_path / "outputs/demo/quickstart/training_progress.png").is_file()
