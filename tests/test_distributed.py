"""Two processes over gloo evaluate exactly, choose the same best model and train to the same weights as one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_script
import pandas as pd
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler
from toys import text_score, tiny_model
from transformers import TrainingArguments
from whole_runs import arguments, assert_same_run, by_two_processes, run

from reward_recipes.run import UserError, repeated_pairs

CONFIG = Path(__file__).resolve().parents[1] / "accelerate_configs" / "multi_gpu.yaml"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found: figures of the first, tensors of both."""
    folder = tmp_path_factory.mktemp("two")
    by_two_processes(distributed_script.__file__, str(folder))
    tensors = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return json.loads((folder / "figures.json").read_text()) | {"ranks": tensors}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same, by this process alone."""
    folder = tmp_path_factory.mktemp("one")
    return {
        "evaluations": distributed_script.evaluations(folder / "a"),
        "best": distributed_script.best_model(folder / "b"),
        "trainings": distributed_script.trainings(folder / "c"),
    }


@pytest.mark.parametrize("layout", ["plain", "packed", "one row"])
def test_evaluation_is_exact(layout: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    """7, 1 and 9 pairs at batch 4 leave the last batch, or a whole process, without enough of them."""
    for count, accuracy in ((7, 4 / 7), (1, 1.0), (9, 5 / 9)):
        figures = two["evaluations"][f"{layout} {count}"]
        assert (figures["eval_accuracy"], figures["eval_pairs"]) == (pytest.approx(accuracy, abs=1e-12), count)
        assert (figures["eval_test_accuracy"], figures["eval_test_pairs"]) == (pytest.approx(2 / 3), 3)
        assert figures == pytest.approx(one["evaluations"][f"{layout} {count}"], rel=1e-6)


def test_the_best_model_is_chosen_by_exact_accuracy(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Both end with the model of step 1, whose scores step 2 turned round."""
    start = text_score(tiny_model("gpt2"), [5, 6, 7, 0])
    for best in (one["best"], two["best"]):
        assert best == pytest.approx({"metric": 5 / 9, "step": 1, "again": 5 / 9, "score": start}, rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "packed", "one row, accumulated", "one row, checkpointed"])
def test_training_ends_with_the_same_weights(kind: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    expected, start = one["trainings"][kind], tiny_model("gpt2").state_dict()
    moved = torch.stack([(expected["weights"][name] - start[name]).norm() for name in start]).norm()
    assert moved > 0.01
    for rank in two["ranks"]:
        weights = rank["trainings"][kind]["weights"]
        apart = torch.stack([(weights[name] - expected["weights"][name]).norm() for name in start]).norm()
        assert apart < 1e-4 * moved
    log = two["ranks"][0]["trainings"][kind]["log"]
    shared = ("loss", "accuracy", "margin", "mean_reward", "pairs", "num_tokens", "num_unique_tokens", "grad_norm")
    assert [log[name] for name in shared] == pytest.approx([expected["log"][name] for name in shared], rel=1e-4)
    rows = [rank["trainings"][kind]["rows"] for rank in two["ranks"]]
    assert len(rows[0]) == len(rows[1]) == 3 * (2 if "accumulated" in kind else 1)
    if kind == "packed":
        assert rows[0] != rows[1]  # the processes pack their pairs into different numbers of rows


def test_all_processes_pack_or_none(two: dict[str, Any]) -> None:
    """There were two, and they decide alike."""
    assert two["setting"] == {"processes": 2, "type": "MULTI_CPU", "backend": "gloo"}
    assert [rank["choices"] for rank in two["ranks"]] == [["shared", None], ["shared", None]]


@pytest.mark.parametrize(("pairs", "processes", "repeated"), [(32, 2, 0), (33, 2, 7), (3, 4, 13)])
def test_pairs_that_accelerate_repeats_are_counted(pairs: int, processes: int, repeated: int) -> None:
    batches = BatchSampler(SequentialSampler(range(pairs)), 4, drop_last=False)
    seen = sum(len(batch) for process in range(processes) for batch in BatchSamplerShard(batches, processes, process))
    assert repeated_pairs(pairs, 4, processes) == repeated == seen - pairs
    assert repeated_pairs(pairs, 4, 1) == 0


def launched(folder: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A training of two processes by the shipped configuration for several GPUs, told to take the processor.

    The time limit is for a hang.
    """
    (folder / "two.yaml").write_text(CONFIG.read_text() + "use_cpu: true\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "two.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "reward_recipes.train", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_several_gpus_in_one_process_are_refused(
    gpt2_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer would split the rows of each batch over them."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(UserError, match="expected one GPU a process, found 2 in one; start as many"):
        run(*arguments(gpt2_dir, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.reliability
def test_a_launched_run_of_two_logs_what_one_logs(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """2 processes of 2 pairs against 1 of 4, packed."""
    options = {"disable_dropout": True, "max_steps": 8}
    run(*arguments(gpt2_dir, data, tmp_path / "one", **options))
    command = arguments(gpt2_dir, data, tmp_path / "two", per_device_train_batch_size=2, **options)
    done = launched(tmp_path, command)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "two" / "run_summary.json").read_text())
    assert (summary["processes"], summary["engine"]) == (2, "MULTI_CPU")
    assert_same_run(tmp_path / "two", tmp_path / "one", tolerance=1e-4)
    tables = [pd.read_csv(tmp_path / name / "test_scores.csv", index_col="row") for name in ("two", "one")]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-4)


@pytest.mark.reliability
def test_the_death_of_one_process_ends_the_launch(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    # Python runs this file at its start; the second process dies as it would of a lack of memory.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, threading\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from reward_recipes.trainer import ExactRewardTrainer as Trainer\n"
        "    step = Trainer.training_step\n"
        "    def dying(self, *args):\n"
        "        if self.state.global_step == 2: os.kill(os.getpid(), 9)\n"
        "        return step(self, *args)\n"
        "    Trainer.training_step = dying\n"
    )
    command = arguments(gpt2_dir, data, tmp_path / "run", early_stopping_patience=9)
    done = launched(tmp_path, command, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode != 0 and "Signal 9" in done.stderr
    assert not (tmp_path / "run" / "run_summary.json").exists()
