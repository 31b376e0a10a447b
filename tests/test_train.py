"""A whole run, as a user starts it: what stands in the output folder afterwards, and what a mistake says."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from whole_runs import arguments

from reward_recipes.callback import COLUMNS
from reward_recipes.config import parse_recipe
from reward_recipes.run.errors import UserError
from reward_recipes.train import train


def run(model: Path, data: Path, output: Path, **options: object) -> None:
    """Train in this process, through the parser."""
    train(*parse_recipe(arguments(model, data, output, **{"disable_dropout": True} | options)))


@pytest.fixture(scope="module")
def finished(gpt2_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished run."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    run(gpt2_dir, data, output, save_state_dict=True)
    return output


def rows(output: Path) -> list[dict[str, str]]:
    """The CSV log."""
    with (output / "reward_model_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_output_folder_holds_the_promised_files_and_no_pickle(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if path.is_file()}
    assert {
        *("model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "data_audit.json", "reward_model.pt"),
        *("reward_model_log.csv", "training_progress.png", "test_metrics.json", "test_scores.csv", "run_summary.json"),
    } <= names
    assert not list(finished.rglob("training_args.bin"))


def test_log_has_one_row_a_window_and_evaluations_on_their_steps(finished: Path) -> None:
    log = rows(finished)
    assert list(log[0]) == list(COLUMNS)
    assert [int(row["step"]) for row in log] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [int(row["step"]) for row in log if row["eval_accuracy"]] == [4, 8, 12, 16]
    for row in log:
        if row["eval_accuracy"]:
            gap = float(row["train_probe_accuracy"]) - float(row["eval_accuracy"])
            assert float(row["overfitting_gap"]) == pytest.approx(gap, abs=1e-9)
    tokens = [int(row["tokens_seen"]) for row in log]
    assert tokens == sorted(tokens) and tokens[-1] == 2 * tokens[3]
    assert all(float(row["pairs_per_second"]) > 0 for row in log)


def test_the_best_model_is_the_one_that_was_saved(finished: Path) -> None:
    log = [row for row in rows(finished) if row["eval_accuracy"]]
    best = max(log, key=lambda row: float(row["eval_accuracy"]))
    assert json.loads((finished / "run_summary.json").read_text())["best_step"] == int(best["step"])
    saved = AutoModelForSequenceClassification.from_pretrained(finished).state_dict()
    checkpoint = AutoModelForSequenceClassification.from_pretrained(finished / f"checkpoint-{best['step']}")
    assert all(torch.equal(saved[name], tensor) for name, tensor in checkpoint.state_dict().items())
    state_dict = torch.load(finished / "reward_model.pt", weights_only=True)
    assert all(torch.equal(saved[name], tensor) for name, tensor in state_dict.items())


def test_training_moved_every_parameter_that_scores(gpt2_dir: Path, finished: Path) -> None:
    trained = AutoModelForSequenceClassification.from_pretrained(finished)
    started = AutoModelForSequenceClassification.from_pretrained(gpt2_dir, num_labels=1)
    before = dict(started.transformer.h.named_parameters())
    still = [name for name, tensor in trained.transformer.h.named_parameters() if torch.allclose(tensor, before[name])]
    assert not still


def test_test_split_is_scored_as_plain_transformers_scores_it(finished: Path, data: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(finished).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished)
    pairs = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    texts = [pair[side] + tokenizer.eos_token for pair in pairs for side in ("chosen", "rejected")]
    with torch.no_grad():
        chosen, rejected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.reshape(-1, 2).T
    metrics = json.loads((finished / "test_metrics.json").read_text())
    assert metrics["test_pairs"] == len(pairs)
    assert metrics["test_accuracy"] == (chosen > rejected).double().mean().item()
    assert metrics["test_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(chosen - rejected).mean().item(), 1e-4)


def test_resolved_recipe_runs_again_and_packs_the_same(finished: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["validation_fraction"] == 0.2 and "hub_token" not in recipe
    train(*parse_recipe(["--config", str(finished / "recipe.yaml"), "--output_dir", str(tmp_path / "again")]))
    plain = tmp_path / "plain"
    train(
        *parse_recipe(
            ["--config", str(finished / "recipe.yaml"), "--output_dir", str(plain), "--pair_packing", "false"]
        )
    )
    for other in (tmp_path / "again", plain):
        for ours, theirs in zip(rows(finished), rows(other), strict=True):
            assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), abs=1e-5)
            assert ours["eval_accuracy"] == theirs["eval_accuracy"] and ours["tokens_seen"] == theirs["tokens_seen"]


def test_a_finished_run_is_not_resumed(
    gpt2_dir: Path, data: Path, finished: Path, capsys: pytest.CaptureFixture
) -> None:
    run(gpt2_dir, data, finished, resume_from_checkpoint="true")
    assert "finished run: nothing to resume" in capsys.readouterr().out


def test_another_run_is_neither_mixed_in_nor_deleted_unasked(gpt2_dir: Path, data: Path, finished: Path) -> None:
    before = (finished / "reward_model_log.csv").read_text()
    with pytest.raises(UserError, match=r"holds another run.*overwrite_output_dir"):
        run(gpt2_dir, data, finished)
    assert (finished / "reward_model_log.csv").read_text() == before


def test_a_mistake_that_the_model_shows_deletes_nothing(gpt2_dir: Path, data: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UserError, match=r"expected settings that fit the model, found: .*target"):
        run(gpt2_dir, data, finished, overwrite_output_dir=True, use_peft=True, lora_target_modules="no_such")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_split_needs_no_margin_because_another_has_one(gpt2_dir: Path, tmp_path: Path) -> None:
    pairs = [{"chosen": f"Q: A reply {n}.", "rejected": f"Q: None {n}."} for n in range(12)]
    write_jsonl(tmp_path / "pairs" / "train.jsonl", [pair | {"margin": 0.5} for pair in pairs[:8]])
    write_jsonl(tmp_path / "pairs" / "test.jsonl", pairs[8:])
    run(gpt2_dir, tmp_path / "pairs", tmp_path / "out", max_steps=2, eval_steps=2, validation_fraction=0)
    assert pd.read_csv(tmp_path / "out" / "test_scores.csv").row.tolist() == [0, 1, 2, 3]


def test_overwriting_deletes_only_files_of_this_tool(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "notes.txt").write_text("keep me")
    (output / "checkpoint-999").mkdir()
    (output / "recipe.yaml").write_text("max_steps: 1")
    (output / "test_scores.csv").write_text("row\n99")
    run(gpt2_dir, data, output, overwrite_output_dir=True, max_steps=2, eval_steps=2)
    assert (output / "notes.txt").read_text() == "keep me"
    assert not (output / "checkpoint-999").exists()
    assert [row["step"] for row in rows(output)] == ["2"]
    assert pd.read_csv(output / "test_scores.csv").row.tolist() == list(range(7))


def test_early_stopping_and_the_last_step_is_evaluated(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    run(gpt2_dir, data, tmp_path / "odd", max_steps=7)
    assert [row["step"] for row in rows(tmp_path / "odd")] == ["2", "4", "6", "7"]
    assert rows(tmp_path / "odd")[-1]["eval_accuracy"]
    frozen = {"learning_rate": 0.0, "early_stopping_patience": 1}
    run(gpt2_dir, data, tmp_path / "stopped", **frozen)
    assert rows(tmp_path / "stopped")[-1]["step"] == "8"


def test_two_eval_sets_give_two_accuracies_and_the_first_chooses(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "two"
    words = arguments(gpt2_dir, data, output, disable_dropout=True)
    train(*parse_recipe([*words, "--eval_splits", "validation", "test"]))
    state = json.loads(next(output.glob("checkpoint-16")).joinpath("trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_accuracy" in entry]
    assert [entry["eval_pairs"] for entry in evaluations] == [8] * 4
    assert [entry["eval_test_pairs"] for entry in evaluations] == [7] * 4
    assert state["best_metric"] == max(entry["eval_accuracy"] for entry in evaluations)
    assert all(0 <= entry["eval_test_accuracy"] <= 1 for entry in evaluations)


def test_lora_leaves_a_plain_model_and_its_adapter(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    run(gpt2_dir, data, output, use_peft=True, lora_target_modules="c_attn", max_steps=8)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    merged = AutoModelForSequenceClassification.from_pretrained(output)
    base = AutoModelForSequenceClassification.from_pretrained(gpt2_dir, num_labels=1)
    attention = "transformer.h.0.attn.c_attn.weight"
    assert not torch.allclose(merged.state_dict()[attention], base.state_dict()[attention])
    metrics = json.loads((output / "test_metrics.json").read_text())
    pairs = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(output)
    texts = [pair[side] + tokenizer.eos_token for pair in pairs for side in ("chosen", "rejected")]
    with torch.no_grad():
        scores = merged.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits.reshape(-1, 2)
    loss = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean().item()
    assert metrics["test_loss"] == pytest.approx(loss, abs=1e-4)


def test_a_mistake_ends_with_one_line_and_status_2(gpt2_dir: Path, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"good": "a", "bad": "b"}])
    command = [sys.executable, "-m", "reward_recipes.train", "--dataset_name", str(pairs)]
    command += ["--model_name_or_path", str(gpt2_dir), "--max_length", "64", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([*command, "--bf16", "false"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert errors[-1].startswith("error:") and "found ['bad', 'good']" in errors[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_two_launched_processes_log_what_one_logs(gpt2_dir: Path, data: Path, finished: Path, tmp_path: Path) -> None:
    """2 processes of 2 pairs against 1 of 4, packed: gloo over `accelerate launch` with the shipped configuration."""
    output = tmp_path / "two"
    shipped = Path(__file__).resolve().parents[1] / "accelerate_configs" / "multi_gpu.yaml"
    config = tmp_path / "two_cpus.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(shipped.read_text()) | {"num_processes": 2, "use_cpu": True}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", "-m", "reward_recipes.train"]
    command += arguments(gpt2_dir, data, output, disable_dropout=True, per_device_train_batch_size=2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    summary = json.loads((output / "run_summary.json").read_text())
    assert (summary["processes"], summary["engine"]) == (2, "MULTI_CPU")
    for ours, theirs in zip(rows(output), rows(finished), strict=True):
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), abs=1e-5)
        assert ours["train_accuracy"] == theirs["train_accuracy"] and ours["tokens_seen"] == theirs["tokens_seen"]
        assert ours["eval_accuracy"] == theirs["eval_accuracy"]
    tables = [pd.read_csv(folder / "test_scores.csv", index_col="row") for folder in (output, finished)]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-4)


def test_processes_that_would_train_apart_are_refused(
    gpt2_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--model_name_or_path", str(gpt2_dir), "--dataset_name", str(data), "--output_dir", str(tmp_path / "apart")]
    parsed = parse_recipe([*args, "--max_length", "128", "--bf16", "false"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="expected the 2 launched processes to train together"):
        train(*parsed)
