"""Two processes over gloo evaluate exactly, choose the same best model and train to the same weights as one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_script
import pytest
import torch
from toys import text_score, tiny_model

ACCURACY = {"7": 4 / 7, "1": 1.0, "9": 5 / 9}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found: figures of the first, tensors of both. The time limit is for a hang."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(distributed_script.__file__)
    done = subprocess.run(
        [*command, str(script), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
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
        "sharded": distributed_script.sharded_gradients(),
    }


def test_there_were_two_processes(two: dict[str, Any]) -> None:
    assert two["setting"] == {"processes": 2, "type": "MULTI_CPU", "backend": "gloo"}


@pytest.mark.parametrize("layout", ["plain", "packed"])
@pytest.mark.parametrize("count", ACCURACY)
def test_evaluation_is_exact(layout: str, count: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    """7, 1 and 9 pairs at batch 4 leave the last batch, or a whole process, without enough of them."""
    figures = two["evaluations"][f"{layout} {count}"]
    assert figures["eval_accuracy"] == pytest.approx(ACCURACY[count], abs=1e-12)
    assert figures["eval_pairs"] == int(count)
    assert (figures["eval_test_accuracy"], figures["eval_test_pairs"]) == (pytest.approx(2 / 3), 3)
    assert figures == pytest.approx(one["evaluations"][f"{layout} {count}"], rel=1e-6)


def test_the_best_model_is_chosen_by_exact_accuracy(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Both end with the model of step 1, whose scores step 2 turned round."""
    start = text_score(tiny_model("gpt2"), [5, 6, 7, 0])
    for best in (one["best"], two["best"]):
        assert best == pytest.approx({"metric": 5 / 9, "step": 1, "again": 5 / 9, "score": start}, rel=1e-6)


@pytest.mark.parametrize("run", ["plain", "packed", "packed, accumulated", "packed, checkpointed"])
def test_training_ends_with_the_same_weights(run: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    expected, start = one["trainings"][run], tiny_model("gpt2").state_dict()
    moved = torch.stack([(expected["weights"][name] - start[name]).norm() for name in start]).norm()
    assert moved > 0.01
    for rank in two["ranks"]:
        weights = rank["trainings"][run]["weights"]
        apart = torch.stack([(weights[name] - expected["weights"][name]).norm() for name in start]).norm()
        assert apart < 1e-4 * moved
    log = two["ranks"][0]["trainings"][run]["log"]
    shared = ("loss", "accuracy", "margin", "mean_reward", "pairs", "num_tokens", "num_unique_tokens", "grad_norm")
    assert [log[name] for name in shared] == pytest.approx([expected["log"][name] for name in shared], rel=1e-4)
    rows = [rank["trainings"][run]["rows"] for rank in two["ranks"]]
    assert len(rows[0]) == len(rows[1]) == 3 * (2 if "accumulated" in run else 1)
    if run == "packed":
        assert rows[0] != rows[1]  # the processes pack their pairs into different numbers of rows


def test_sharded_parameters_get_the_same_gradients(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Weights split over two processes by FSDP2, gathered module by module; the same batch on both."""
    whole = torch.stack([gradient.norm() for gradient in one["sharded"].values()]).norm()
    for rank in two["ranks"]:
        assert set(rank["sharded"]) == set(one["sharded"])
        for name, gradient in rank["sharded"].items():
            assert (gradient - one["sharded"][name]).norm() < 1e-5 * whole, name


def test_all_processes_pack_or_none(two: dict[str, Any]) -> None:
    """Only one of them compares scores, the others hear of it."""
    assert [rank["choices"] for rank in two["ranks"]] == [[True, False], [True, False]]
