"""Two processes: a run that goes through, one that is stopped by a signal to the second process, and its resumption."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from whole_runs import run

from reward_recipes import train as train_module
from reward_recipes.config import parse_recipe
from reward_recipes.run.signals import Interrupted, Interruption
from reward_recipes.trainer import ExactRewardTrainer


def main(folder: Path, command: list[str]) -> None:
    """Train three times in the same processes."""
    state = PartialState(cpu=True)
    assert state.num_processes == 2 and state.distributed_type.value == "MULTI_CPU"
    run(*command, "--output_dir", str(folder / "whole"))
    interrupted = [*command, "--output_dir", str(folder / "run")]
    interruption = Interruption()
    interruption.listen()
    step, calls = ExactRewardTrainer.training_step, iter(range(10**6))

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 10 and state.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    ExactRewardTrainer.training_step = signalled
    try:
        train_module.train(*parse_recipe(interrupted), interruption=interruption)
        raise AssertionError("the run was not stopped")
    except Interrupted as stopped:
        assert stopped.code == 128 + signal.SIGTERM
    run(*interrupted, "--resume_from_checkpoint", "true")
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
