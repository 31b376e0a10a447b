"""Two processes, whole runs: one that nothing disturbs, one that a signal stops, and ones whose writes fail."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import PreTrainedModel
from whole_runs import before_calls, run, sketched_pictures

from reward_recipes import train as train_module
from reward_recipes.config import parse_recipe
from reward_recipes.run import StopOnSignal, UserError
from reward_recipes.trainer import ExactRewardTrainer


def stopped_and_resumed(command: list[str]) -> None:
    """SIGTERM to the second process in step 11, which is inside a logging window; then the rest of the run."""
    stop = StopOnSignal()
    stop.listen()

    def send(call: int, *args: object) -> None:
        if call == 10 and PartialState().process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with before_calls(ExactRewardTrainer, "training_step", send), pytest.raises(SystemExit) as stopped:
        train_module.train(*parse_recipe(command), stop=stop)
    assert stopped.value.code == 128 + signal.SIGTERM
    run(*command, "--resume_from_checkpoint", "true")


def with_full_disk(owner: Any, name: str, process: int, command: list[str]) -> None:
    """A run in which `process` cannot write, by a function whose last argument is a path, what step 8 saves."""

    def fail(call: int, *args: object) -> None:
        if PartialState().process_index == process and "-8" in str(args[-1])[-20:]:
            raise OSError(28, "No space left on device")

    with before_calls(owner, name, fail):
        run(*command)


def with_a_changed_replica(command: list[str]) -> None:
    """A run whose second process holds another weight when checkpoint 8 is due, as after a fault of its device."""

    def change(call: int, trainer: ExactRewardTrainer, *args: object) -> None:
        if trainer.state.global_step == 8 and PartialState().process_index == 1:
            trainer.model.score.weight.data[0, 0] += 1e-4

    with before_calls(ExactRewardTrainer, "_save_checkpoint", change):
        run(*command)


def main(folder: Path, command: list[str]) -> None:
    """Train in the same processes, one run after another."""
    state = PartialState(cpu=True)
    assert state.num_processes == 2 and state.distributed_type.value == "MULTI_CPU"

    def into(name: str, *more: str) -> list[str]:
        return [*command, *more, "--output_dir", str(folder / name)]

    limit = ("--save_total_limit", "9")
    with sketched_pictures():
        run(*into("whole"))
        stopped_and_resumed(into("stopped"))
        with_full_disk(PreTrainedModel, "save_pretrained", 0, into("first", *limit))
        with_full_disk(torch, "save", 1, into("second", *limit))
        try:
            with_a_changed_replica(into("apart"))
        except UserError as error:
            print(error)
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
