"""A whole run: what stands in the output folder afterwards, and what becomes of what stood there before."""

import json
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
from reward_recipes.evaluate import training_picture
from reward_recipes.evaluate.training_picture import plot_training
from reward_recipes.run import UserError
from reward_recipes.run.console import quiet_libraries
from reward_recipes.train import train

pytestmark = pytest.mark.usefixtures("sketched")


def run(model: Path, data: Path, output: Path, *words: str, **options: object) -> None:
    """Train in this process, through the parser."""
    train(*parse_recipe([*arguments(model, data, output, **{"disable_dropout": True} | options), *words]))


def log_of(output: Path) -> pd.DataFrame:
    return pd.read_csv(output / "reward_model_log.csv")


@pytest.fixture(scope="module")
def finished(gpt2_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished run."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    run(gpt2_dir, data, output, "--eval_splits", "validation", "test", save_state_dict=True)
    return output


def test_output_folder_holds_the_promised_files_and_no_pickle(finished: Path, data: Path) -> None:
    names = {path.name for path in finished.iterdir() if path.is_file()}
    assert {
        *("model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "data_audit.json", "reward_model.pt"),
        *("reward_model_log.csv", "training_progress.png", "test_metrics.json", "test_scores.csv", "run_summary.json"),
    } <= names
    assert not list(finished.rglob("training_args.bin"))
    assert_test_figures_are_of_the_saved_model(finished, data)


def test_log_has_one_row_a_window_and_evaluations_on_their_steps(finished: Path) -> None:
    log = log_of(finished)
    assert list(log) == list(COLUMNS) and log.step.tolist() == [2, 4, 6, 8, 10, 12, 14, 16]
    evaluated = log[log.eval_accuracy.notna()]
    assert evaluated.step.tolist() == [4, 8, 12, 16]
    gaps = evaluated.train_probe_accuracy - evaluated.eval_accuracy
    assert evaluated.overfitting_gap.tolist() == pytest.approx(gaps.tolist(), abs=1e-9)
    assert log.tokens_seen.is_monotonic_increasing and log.tokens_seen[7] == 2 * log.tokens_seen[3]
    assert (log.pairs_per_second > 0).all()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).state_dict()


def test_the_best_model_is_the_one_that_was_saved_and_all_of_it_moved(gpt2_dir: Path, finished: Path) -> None:
    log = log_of(finished)
    best = log.step[log.eval_accuracy.idxmax()]
    assert json.loads((finished / "run_summary.json").read_text())["best_step"] == best
    saved, start = weights_of(finished), weights_of(gpt2_dir)
    state_dict = torch.load(finished / "reward_model.pt", weights_only=True)
    for other in (weights_of(finished / f"best-{best}"), state_dict):
        assert all(torch.equal(saved[name], tensor) for name, tensor in other.items())
    assert not [name for name in saved if "transformer.h." in name and torch.allclose(saved[name], start[name])]


def assert_test_figures_are_of_the_saved_model(output: Path, data: Path) -> None:
    """As plain transformers scores the pairs, without this package."""
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    pairs = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    texts = [pair[side] + tokenizer.eos_token for pair in pairs for side in ("chosen", "rejected")]
    with torch.no_grad():
        chosen, rejected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.reshape(-1, 2).T
    metrics = json.loads((output / "test_metrics.json").read_text())
    assert metrics["test_pairs"] == len(pairs)
    assert metrics["test_accuracy"] == (chosen > rejected).double().mean().item()
    assert metrics["test_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(chosen - rejected).mean().item(), 1e-4)


def test_resolved_recipe_runs_again_and_unpacked_the_same(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints are rows and lines, no dictionaries and no bars."""
    recipe = finished / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["validation_fraction"] == 0.2
    plain = ["--output_dir", str(tmp_path / "plain"), "--pair_packing", "false"]
    quiet_libraries()  # as `run_cli` does
    train(*parse_recipe(["--config", str(recipe), *plain]))
    said = capsys.readouterr()
    shown = [line.split()[0] for line in said.out.split("time left\n")[1].split("best step")[0].splitlines()]
    ours, theirs = log_of(finished), log_of(tmp_path / "plain")
    assert [int(step) for step in shown] == ours.step.tolist()
    assert not set("{}\r") & set(said.out + said.err)
    same = ["step", "eval_accuracy", "tokens_seen"]
    pd.testing.assert_frame_equal(ours[same], theirs[same])
    assert ours.train_loss.tolist() == pytest.approx(theirs.train_loss.tolist(), abs=1e-5)


def test_a_finished_run_is_not_deleted_unasked_nor_for_a_run_that_cannot_start(
    gpt2_dir: Path, data: Path, finished: Path
) -> None:
    """Adapter, optimizer, its package and the schedule are made before the earlier run's files go."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UserError, match=r"holds another run.*overwrite_output_dir"):
        run(gpt2_dir, data, finished)
    for options, word in (
        ({"use_peft": True, "lora_target_modules": "no_such"}, "target"),
        ({"optim": "galore_adamw", "optim_target_modules": "attn"}, "galore"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"no_such": 1}'}, "no_such"),
        ({"use_liger_kernel": True}, "liger"),
    ):
        with pytest.raises(UserError, match=f"expected settings that fit the model, found: .*{word}"):
            run(gpt2_dir, data, finished, overwrite_output_dir=True, **options)
        assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_split_needs_no_margin_because_another_has_one(gpt2_dir: Path, tmp_path: Path) -> None:
    pairs = [{"chosen": f"Q: A reply {n}.", "rejected": f"Q: None {n}."} for n in range(12)]
    write_jsonl(tmp_path / "pairs" / "train.jsonl", [pair | {"margin": 0.5} for pair in pairs[:8]])
    write_jsonl(tmp_path / "pairs" / "test.jsonl", pairs[8:])
    run(gpt2_dir, tmp_path / "pairs", tmp_path / "out", max_steps=2, eval_steps=2, validation_fraction=0)
    assert pd.read_csv(tmp_path / "out" / "test_scores.csv").row.tolist() == [0, 1, 2, 3]


def test_overwriting_deletes_only_files_of_this_tool(
    gpt2_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_picture, "plot_training", plot_training)  # the real one
    output = tmp_path / "mine"
    output.mkdir()
    (output / "notes.txt").write_text("keep me")
    (output / "checkpoint-999").mkdir()
    (output / "recipe.yaml").write_text("max_steps: 1")
    (output / "test_scores.csv").write_text("row\n99")
    run(gpt2_dir, data, output, overwrite_output_dir=True, max_steps=2, eval_steps=2)
    assert (output / "notes.txt").read_text() == "keep me"
    assert not (output / "checkpoint-999").exists() and not (output / "earlier_run").exists()
    assert log_of(output).step.tolist() == [2]
    assert (output / "training_progress.png").read_bytes().startswith(b"\x89PNG")
    assert pd.read_csv(output / "test_scores.csv").row.tolist() == list(range(7))


def test_an_evaluation_on_start_is_row_0_and_never_the_best_step(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    run(gpt2_dir, data, tmp_path / "run", eval_on_start=True, max_steps=4, learning_rate=0.0)
    log = log_of(tmp_path / "run")
    assert log.step.tolist() == [0, 2, 4]
    assert pd.isna(log.train_loss[0]) and log.eval_accuracy[0] == log.eval_accuracy[2]  # nothing was learned
    assert json.loads((tmp_path / "run" / "run_summary.json").read_text())["best_step"] == 4


def test_two_eval_sets_give_two_accuracies_and_the_first_chooses(finished: Path) -> None:
    state = json.loads((finished / "checkpoint-16" / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_accuracy" in entry]
    assert [(entry["eval_pairs"], entry["eval_test_pairs"]) for entry in evaluations] == [(8, 7)] * 4
    assert state["best_metric"] == max(entry["eval_accuracy"] for entry in evaluations)
    assert all(0 <= entry["eval_test_accuracy"] <= 1 for entry in evaluations)


def test_lora_leaves_a_plain_model_and_its_adapter_which_is_no_base(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    run(gpt2_dir, data, output, use_peft=True, lora_target_modules="c_attn", max_steps=4)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    attention = "transformer.h.0.attn.c_attn.weight"
    assert not torch.allclose(weights_of(output)[attention], weights_of(gpt2_dir)[attention])
    assert_test_figures_are_of_the_saved_model(output, data)
    with pytest.raises(UserError, match="adapter: expected a model, found an adapter"):
        run(output / "adapter", data, tmp_path / "again", max_steps=4)


def test_processes_that_would_train_apart_are_refused(
    gpt2_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--model_name_or_path", str(gpt2_dir), "--dataset_name", str(data), "--output_dir", str(tmp_path / "apart")]
    parsed = parse_recipe([*args, "--max_length", "128", "--bf16", "false"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="expected the 2 launched processes to train together"):
        train(*parsed)
