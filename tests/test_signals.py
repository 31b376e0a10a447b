"""SIGTERM and SIGINT end a run between two steps, with a checkpoint; nothing in its log tells of the interruption."""

import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_runs import MODES, arguments, assert_same_run, before_calls, in_child, log_of, run

from reward_recipes import train as train_module
from reward_recipes.run import latest_valid
from reward_recipes.trainer import ExactRewardTrainer

pytestmark = pytest.mark.usefixtures("sketched")
# Kinds that count steps and keep state in other ways than the first.
KINDS = ["packed", *(pytest.param(mode, marks=pytest.mark.reliability) for mode in MODES if mode != "packed")]


def main_with(
    owner: Any, name: str, signals: dict[int, list[int]], command: list[str], group: bool = False
) -> Callable[[], None]:
    """`python -m reward_recipes.train`, which gets signals, or its `group` does, in calls from 0 on of a function."""

    def send(call: int, *args: object) -> None:
        for number in signals.get(call, []):
            for process in [os.getpid(), *(worker.pid for worker in multiprocessing.active_children() if group)]:
                os.kill(process, number)

    def work() -> None:
        sys.argv = ["train", *command]
        with before_calls(owner, name, send):
            train_module.main()

    return work


def resume_command(printed: str) -> list[str]:
    """The words of the command that the run printed, without the interpreter and the module."""
    (line,) = [line for line in printed.splitlines() if line.startswith("stopped by")]
    words = shlex.split(line.split("continue with: ")[1])
    assert words[:3] == ["python", "-m", "reward_recipes.train"]
    return words[3:]


@pytest.mark.parametrize("mode", KINDS)
def test_inside_a_logging_window(mode: str, gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """SIGTERM in step 7 of a run that logs every third and evaluates every sixth: one of three steps is summed up."""
    windows = MODES[mode] | {"logging_steps": 3, "eval_steps": 6, "save_steps": 6}
    run(*arguments(gpt2_dir, data, tmp_path / "whole", **windows))
    output = tmp_path / "run"
    micro_batches = MODES[mode].get("gradient_accumulation_steps", 1)
    in_step_7 = {6 * micro_batches - (mode == "accumulation"): [signal.SIGTERM]}  # its 6th step has one micro-batch
    command = arguments(gpt2_dir, data, output, **windows)
    status, printed = in_child(main_with(ExactRewardTrainer, "training_step", in_step_7, command))
    assert status == 128 + signal.SIGTERM, printed[-3000:]
    assert "stopped by SIGTERM after step 7;" in printed
    assert latest_valid(output) == output / "checkpoint-7"
    assert log_of(output) == log_of(tmp_path / "whole")[:2]
    picture, manifest = output / "training_progress.png", output / "checkpoint-7" / "manifest.json"
    assert picture.stat().st_mtime_ns > manifest.stat().st_mtime_ns
    run(*resume_command(printed))
    assert_same_run(output, tmp_path / "whole")


def test_a_deadline_ends_a_run_as_a_signal_does(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """A hundredth of a second: after the first step."""
    command = arguments(gpt2_dir, data, tmp_path / "run", max_run_time=0.01 / 3600)
    status, printed = in_child(main_with(ExactRewardTrainer, "training_step", {}, command))
    assert status == 128 + signal.SIGTERM, printed[-3000:]
    assert "stopped by max_run_time=2.77778e-06 after step 1;" in printed
    assert latest_valid(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"


def test_in_an_evaluation_and_twice(gpt2_dir: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """The evaluation is finished, then a checkpoint is saved; a second signal of another kind changes nothing."""
    twice = {1: [signal.SIGINT, signal.SIGTERM]}
    command = arguments(gpt2_dir, data, tmp_path / "run", save_steps=100)
    status, printed = in_child(main_with(ExactRewardTrainer, "evaluate", twice, command))
    assert status == 128 + signal.SIGINT, printed[-3000:]
    assert "stopped by SIGINT after step 8;" in printed
    assert log_of(tmp_path / "run") == log_of(whole)[:4]
    run(*resume_command(printed))
    assert_same_run(tmp_path / "run", whole)


def test_a_second_ctrl_c_stops_at_once(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """Also within a checkpoint, which then does not count."""
    command = arguments(gpt2_dir, data, tmp_path / "run")
    twice = {1: [signal.SIGINT, signal.SIGINT]}
    status, printed = in_child(main_with(ExactRewardTrainer, "_save_rng_state", twice, command))
    assert status == 128 + signal.SIGINT and "stopped by" not in printed and "Traceback" not in printed
    assert (tmp_path / "run" / "checkpoint-8").is_dir()
    assert latest_valid(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


@pytest.mark.parametrize(("place", "number"), [("prepare_data", signal.SIGTERM), ("_save_model", signal.SIGINT)])
def test_outside_training_at_once(place: str, number: int, gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    command = arguments(gpt2_dir, data, tmp_path / "run", max_steps=1)
    status, printed = in_child(main_with(train_module, place, {0: [number]}, command))
    assert status == 128 + number and "Traceback" not in printed
    assert (tmp_path / "run" / "recipe.yaml").exists() == (place == "_save_model")


@pytest.mark.reliability
def test_a_signal_to_the_whole_group_ends_with_its_status_too(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """It ends the data loader's worker as well; what the run then saves or not, it goes on exactly."""
    options = {"dataloader_num_workers": 1, "num_train_epochs": 3}
    run(*arguments(gpt2_dir, data, tmp_path / "whole", **options))
    command = arguments(gpt2_dir, data, tmp_path / "run", **options)
    in_step_10 = {9: [signal.SIGTERM]}
    status, printed = in_child(main_with(ExactRewardTrainer, "training_step", in_step_10, command, group=True))
    assert status == 128 + signal.SIGTERM and "Traceback" not in printed, printed[-3000:]
    assert latest_valid(tmp_path / "run") is not None
    run(*command, "--resume_from_checkpoint", "true")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
