"""What a run says of itself, against counts by hand: tokens, weights, seconds, the commit, each test pair's scores."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import hh_pairs, write_jsonl
from peft import get_peft_model
from toys import config, pair, text_score, tiny_model, tiny_trainer
from transformers import AutoModelForSequenceClassification
from trl import ModelConfig
from whole_runs import arguments, assert_same_run, run

from reward_recipes.config import parse_recipe
from reward_recipes.data import prepare_data
from reward_recipes.evaluate import compute_preference_metrics
from reward_recipes.evaluate.training_log import read_log
from reward_recipes.evaluate.uncertainty import reliability_metrics
from reward_recipes.pairs import load_recipe_tokenizer
from reward_recipes.run import cost, made_with
from reward_recipes.run import provenance as module
from reward_recipes.run.checkpoints import write_manifest
from reward_recipes.score import peft_config

pytestmark = pytest.mark.usefixtures("sketched")
LOG = pd.DataFrame({"elapsed_seconds": [1.5, 4.25]})
# A GPT-2 of width 32 with two blocks, in each: two norms; attention's 3 + 1 maps; up and down between 32 and 128.
BLOCK = 2 * 64 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
WEIGHTS = 2 * BLOCK + 64 + 32  # the last norm, the head


def summary_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "run_summary.json").read_text())


@pytest.mark.parametrize(("limit", "packed"), [({}, False), ({"max_tokens_per_row": 16}, True)])
def test_cost_is_what_the_pairs_hold(limit: dict[str, int], packed: bool, tmp_path: Path) -> None:
    """Pair 0 has 5 + 4 tokens with EOS, 3 of them common; pair 1 has 3 + 2, nothing common; 3 steps of both.

    An adapter of rank 4 stands beside each block's map of 32 to 96, the head in a copy.
    """
    pairs = [pair([5, 6, 7, 8], [5, 6, 7]), pair([5, 6], [7])]
    args = config(tmp_path, max_steps=3, per_device_train_batch_size=2)
    trainer = tiny_trainer(tiny_model("gpt2"), args, pairs, **limit)
    trainer.train()
    counts = {"pairs": 3 * 2, "num_tokens": 3 * 14, "num_unique_tokens": 3 * 11, "num_padded_tokens": 3 * 20}
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {name: last[name] for name in counts} == counts
    others = {"packed": packed, "seconds": 4.25, "weights": WEIGHTS}
    assert cost(trainer.model, trainer.totals, trainer.packed, LOG) == counts | others
    lora = peft_config(ModelConfig("any", use_peft=True, lora_r=4, lora_target_modules=["c_attn"]))
    adapted = cost(get_peft_model(trainer.model, lora), {}, packed, LOG)
    assert adapted["weights"] == WEIGHTS + 2 * 4 * (32 + 96) + 32


def test_a_run_sums_up_what_it_cost_and_was_made_with(whole: Path) -> None:
    """32 pairs, two epochs of 8 steps of 4."""
    summary = summary_of(whole)
    found = summary["cost"]
    assert found["pairs"] == 2 * 32 and found["num_padded_tokens"] >= found["num_tokens"] > found["num_unique_tokens"]
    assert found["packed"] is False and found["weights"] == WEIGHTS  # dropout is on, so no prompt is shared
    assert 0 < found["seconds"] == read_log(whole / "reward_model_log.csv")["elapsed_seconds"].iloc[-1]
    assert summary["device"] == f"CPU, {torch.get_num_threads()} thread(s)"
    assert summary["versions"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])  # "2.11.0+cu130"
    assert set(summary["versions"]) == set(module.PACKAGES)


def test_a_resumed_run_counts_seconds_of_all_attempts(gpt2_dir: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """Killed after the checkpoint of step 12, up to which it had taken, let us say, 1,000 seconds."""
    killed = shutil.copytree(whole, tmp_path / "killed")
    (killed / "run_summary.json").unlink()
    shutil.rmtree(killed / "checkpoint-16")
    path = killed / "checkpoint-12" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["CSVLogCallback"]["attributes"]["elapsed"] = 1000.0
    path.write_text(json.dumps(state))
    write_manifest(path.parent)
    run(*arguments(gpt2_dir, data, killed, resume_from_checkpoint="true"))
    assert 1000 < summary_of(killed)["cost"]["seconds"] < 2000
    assert_same_run(killed, whole)


def scores_of(output: Path) -> pd.DataFrame:
    return pd.read_csv(output / "test_scores.csv", dtype={"chosen_score": "float32", "rejected_score": "float32"})


def test_the_scores_of_the_test_pairs_give_its_figures(gpt2_dir: Path, data: Path, whole: Path) -> None:
    figures = json.loads((whole / "test_metrics.json").read_text())
    table = scores_of(whole)
    assert table.row.tolist() == list(range(7)) and table.subset.isna().all()
    script, recipe, model_args, _ = parse_recipe(arguments(gpt2_dir, data, whole))
    test = prepare_data(script, recipe, load_recipe_tokenizer(recipe, model_args)).test
    for name in ("prompt_id", "chosen_length", "rejected_length"):
        assert table[name].tolist() == test[name][:]
    scores = table[["chosen_score", "rejected_score"]].to_numpy()
    model = AutoModelForSequenceClassification.from_pretrained(whole)
    by_hand = [[text_score(model, pair[side]) for side in ("chosen_ids", "rejected_ids")] for pair in test]
    np.testing.assert_allclose(scores, by_hand, atol=1e-5)
    again = compute_preference_metrics(scores) | reliability_metrics(scores, table.prompt_id.to_numpy())
    for name in ("accuracy", "ties", "loss", "pairs", "prompts", "accuracy_ci95", "brier", "ece"):
        assert again[name] == pytest.approx(figures[f"test_{name}"], abs=1e-12), name
    assert 0 < figures["test_accuracy"] < 1 and figures["test_prompts"] == 6


def test_scores_of_subsets_bear_their_names(gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is asked first: the checkout may move on while the run goes on."""
    monkeypatch.setattr(module, "_commit", lambda: "later" if (tmp_path / "run").exists() else "before")
    for index, name in enumerate(("b", "a, b")):
        write_jsonl(tmp_path / "pairs" / name / "train.jsonl", hh_pairs(8, start=10 * index))
        write_jsonl(tmp_path / "pairs" / name / "test.jsonl", hh_pairs(2, start=50 + index))
    options = {"validation_fraction": 0.0, "max_steps": 2, "eval_steps": 2, "train_probe_size": 0}
    words = arguments(gpt2_dir, tmp_path / "pairs", tmp_path / "run", **options)
    run(*words, "--dataset_data_dirs", "b", "a, b", "--max_eval_samples", "1")
    table = scores_of(tmp_path / "run")  # whole, though the same split is evaluated by one pair
    assert table.subset.tolist() == ["b", "b", "a, b", "a, b"]
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["eval_pairs"] for entry in state["log_history"] if "eval_pairs" in entry] == [1]
    assert summary_of(tmp_path / "run")["commit"] == "before"


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_named_and_marked_where_the_package_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None outside a checkout, in another one's folder of installed packages, on a machine without git."""

    def commit(file: Path) -> str | None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        monkeypatch.setattr(module, "__file__", str(file))
        return made_with(torch.device("cpu"))["commit"]

    checkout = tmp_path / "checkout"
    ours = checkout / "src" / "package" / "provenance.py"
    assert commit(ours) is None
    (checkout / "page.md").touch()
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "one")
    head = git(checkout, "rev-parse", "HEAD")[:7]
    (checkout / "page.md").write_text("changed")  # runs nothing
    assert commit(ours) == head and commit(checkout / ".venv" / "provenance.py") is None
    ours.write_text("changed = 1")
    assert commit(ours) == f"{head}+"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(ours) is None
