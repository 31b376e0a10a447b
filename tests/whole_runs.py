"""Whole runs from the command line on, in this process or in a child that can be killed; pure functions, for tests."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reward_recipes import train as train_module
from reward_recipes.callback import CSVLogCallback
from reward_recipes.config import parse_recipe
from reward_recipes.evaluate import training_picture
from reward_recipes.run import CheckpointKeeper, UserError, replacing
from reward_recipes.trainer import ExactRewardTrainer

# Dropout, so that the random states matter; 32 training pairs; a row every 2 steps, the rest every 4.
OPTIONS: dict[str, Any] = {
    "max_length": 128,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "eval_steps": 4,
    "save_steps": 4,
    "train_probe_size": 8,
    "validation_fraction": 0.2,
    "disable_dropout": False,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {"pair_packing": "false"},
    "packed": {"pair_packing": "true"},
    "lora": {"use_peft": True, "lora_target_modules": "c_attn"},
    # 32 pairs make 11 micro-batches, so 6 steps an epoch, the last one of a single micro-batch of two pairs.
    "accumulation": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
}
TIMING = ("pairs_per_second", "elapsed_seconds")


def arguments(model: Path, data: Path, output: Path, **options: object) -> list[str]:
    """The command line of a run."""
    named = OPTIONS | {"model_name_or_path": model, "dataset_name": data, "output_dir": output} | options
    return [text for name, value in named.items() for text in (f"--{name}", str(value))]


def run(*command: str) -> None:
    """Train in this process."""
    train_module.train(*parse_recipe(command))


def _sketch(log: Path, picture: Path, ceiling: float | None = None) -> None:
    try:
        with replacing(picture) as partial_file:
            partial_file.write_text("a sketch")
    except OSError as error:
        raise UserError(f"expected to write {picture}, found: {error.strerror}") from error


@contextmanager
def sketched_pictures() -> Iterator[None]:
    """A word in place of each training picture: to draw them takes two thirds of a toy run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_picture, "plot_training", _sketch)
        yield


def log_of(output: Path) -> list[dict[str, str]]:
    """The CSV log without the columns that say how long things took."""
    with (output / "reward_model_log.csv").open(newline="") as file:
        return [{name: row[name] for name in row if name not in TIMING} for row in csv.DictReader(file)]


def assert_same_run(output: Path, expected: Path, tolerance: float = 1e-6) -> None:
    """Log, best step, test figures, totals and weights of two finished runs agree."""
    ours, theirs = log_of(output), log_of(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, row in zip(ours, theirs, strict=True):
        assert {name for name in mine if mine[name]} == {name for name in row if row[name]}, row["step"]
        figures = {name: float(value) for name, value in row.items() if value}
        assert {name: float(mine[name]) for name in figures} == pytest.approx(figures, abs=tolerance), row["step"]
    test, other = (json.loads((folder / "test_metrics.json").read_text()) for folder in (output, expected))
    assert test["best_step"] == other["best_step"]
    assert test["test_loss"] == pytest.approx(other["test_loss"], abs=tolerance)
    cost, other = (json.loads((folder / "run_summary.json").read_text())["cost"] for folder in (output, expected))
    for name in ("pairs", "num_tokens", "num_unique_tokens"):
        assert cost[name] == other[name], name
    weights = [load_file(folder / "model.safetensors") for folder in (output, expected)]
    torch.testing.assert_close(*weights, rtol=0, atol=tolerance)


@contextmanager
def before_calls(owner: Any, name: str, act: Callable[..., object]) -> Iterator[None]:
    """Call `act` before each call to a function, with the number of the call, from 0, and its arguments by place."""
    original, calls = getattr(owner, name), itertools.count()

    def watched(*args: Any, **kwargs: Any) -> Any:
        act(next(calls), *args)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


def by_two_processes(script: str, *words: str) -> str:
    """What a script prints that torchrun starts twice; the time limit is for a hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def in_child(work: Callable[[], None]) -> tuple[int, str]:
    """Do `work` in a forked child, which need not import torch; its status, negative for a signal, and its output."""
    reading, writing = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # Python 3.12 warns of threads, which wait here
        child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
            status = _status(work)
            sys.stdout.flush()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        printed = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), printed


def _status(work: Callable[[], None]) -> int:
    try:
        work()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


Point = tuple[str, int, int]  # a place, the call to it and the event in the call, or its end, as `counted` numbers them
# Functions in whose calls a run is killed.
PLACES: dict[str, tuple[Any, str]] = {
    "checkpoint": (ExactRewardTrainer, "_save_checkpoint"),
    "best": (CheckpointKeeper, "save_best"),
    "row": (CSVLogCallback, "_write"),
    "step": (ExactRewardTrainer, "training_step"),
    "end": (train_module, "_save_model"),
}


@contextmanager
def counted(place: str, act: Callable[[int, int], None]) -> Iterator[None]:
    """Call `act` with the number of the call to a place, from 0, and that of the event within it; -1 at its end.

    Events are the calls and returns of Python and C functions, those that write a part of a file among them.
    """
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), itertools.count()

    def watched(*args: Any, **kwargs: Any) -> Any:
        call, events = next(calls), itertools.count()
        sys.setprofile(lambda *event: act(call, next(events)))
        try:
            return original(*args, **kwargs)
        finally:
            sys.setprofile(None)
            act(call, -1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


def copied_at(points: dict[Point, Path], output: Path, command: list[str]) -> None:
    """Run, and copy the run's folder at each point to another one."""

    def copy(place: str, call: int, event: int) -> None:
        for point, folder in points.items():
            if point[:2] == (place, call) and event in (point[2], -1) and not folder.exists():
                shutil.copytree(output, folder)

    with ExitStack() as places:
        for place in {place for place, *_ in points}:
            places.enter_context(counted(place, partial(copy, place)))
        run(*command)
    assert all(folder.exists() for folder in points.values())


def killed_at(place: str, call: int, event: int, command: list[str]) -> None:
    """A run in a child that kills itself with SIGKILL at a point."""

    def kill(*reached: int) -> None:
        if reached in ((call, event), (call, -1)):
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        with counted(place, kill):
            run(*command)

    status, printed = in_child(work)
    assert status == -signal.SIGKILL, printed[-3000:]
