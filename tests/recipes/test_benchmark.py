"""Whole runs of the benchmark: stock TRL and this package train the same pairs to the same losses, tokens counted."""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import timed_run
from conftest import as_pairs, hh_pairs, save_reward_model
from whole_runs import in_child

from reward_recipes.pairs import encode_splits, load_tokenizer

pytestmark = pytest.mark.usefixtures("sketched")


def test_a_run_by_both_sides(gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 pairs in two steps of 32, evaluated after each on 31 held-out pairs and one of training; no dropout."""

    def forked(command: list[str], env: dict[str, str], **kwargs: Any) -> SimpleNamespace:
        def work() -> None:
            warnings.simplefilter("ignore")  # stock TRL's
            monkeypatch.setattr(sys, "argv", command[1:])
            timed_run.main()

        status, printed = in_child(work)
        return SimpleNamespace(returncode=status, stderr=printed)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=forked))
    model = save_reward_model(gpt2_dir, tmp_path / "model")
    source = as_pairs(hh_pairs(96))
    pairs = encode_splits({"train": source}, load_tokenizer(str(model)), 120, "drop", [])["train"]
    options = {"model_name_or_path": str(model), "bf16": False, "max_length": 120, "use_cpu": True}
    scale = runs.Scale(pairs=64, evaluations=2, scored=1.0)
    found = runs.compare_runs("one_epoch", scale, 1, 4, pairs, source.rows, **options)
    assert found["pairs"] == {"trained": 64, "scored": 64}
    assert found["loss_difference"] < 1e-5
    lengths = list(zip(pairs["chosen_length"], pairs["rejected_length"], pairs["prefix"], strict=True))
    unique = [chosen + rejected - prefix for chosen, rejected, prefix in lengths]
    scored = sum(unique[64:95]) + min(unique[:64])  # the probe is one of the training pairs
    assert 0 <= found["tokens"][runs.OURS] - 3 * sum(unique[:64]) - 2 * scored < 2 * max(unique)
    assert found["tokens"]["bound"] > 1.5
    for side, phases in found["phases"].items():
        assert phases["training"] > 0 and phases["evaluation"] > 0 and phases["saving"] > 0 and phases["data"] > 0
        assert sum(phases.values()) == pytest.approx(found["seconds"][side], rel=0.2)
    page = runs.format_runs([json.loads(json.dumps(found))], 4)
    assert page.startswith("| run | stock TRL, s |") and "| one_epoch, stock, best eval batch |" in page
