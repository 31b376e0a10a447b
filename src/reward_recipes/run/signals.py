"""What SIGTERM and SIGINT do to a run: while it trains they wait for the end of the step, elsewhere they end it."""

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reward_recipes.run.output import RECIPE


class Interrupted(SystemExit):
    """Training ended between two steps because of a signal; the exit status is 128 and the signal's number."""


class Interruption:
    """Notes the first SIGTERM or SIGINT that comes in `deferred`; outside it, and on a second Ctrl-C, ends at once.

    `signal` is the number of the signal that was noted. Without `listen`, Python's own handlers stay.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._deferring = False

    def listen(self) -> None:
        """Take over both signals of this process; from its main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While training: a signal waits for the end of the step.

        A data loader's worker, or another process, that the same signal ended is no reason for a traceback: the run
        ends with the signal's status, and its last checkpoint is what it leaves.
        """
        self._deferring = True
        try:
            yield
        except RuntimeError:
            if self.signal is None:
                raise
            raise SystemExit(128 + self.signal) from None
        finally:
            self._deferring = False
        if self.signal is not None:  # it came after the last step, whose checkpoint is there
            raise SystemExit(128 + self.signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring or (self.signal is not None and number == signal.SIGINT):
            raise SystemExit(128 + number)
        self.signal = self.signal or number


class StopOnSignal(TrainerCallback):
    """Ends training after the step, or the evaluation, in which a process got a signal, and saves a checkpoint first.

    Add it behind the callbacks that must see that checkpoint. The processes agree by a gather of one number per step.
    transformers' own `enable_jit_checkpoint` knows neither SIGINT nor several processes, and ends with status 0.
    """

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint; evaluation, if one is due, comes before it, as in a run that nothing stops."""
        control.should_save = control.should_save or self._agreed() is not None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run, and say how to go on.

        Raises:
            Interrupted: a signal came.
        """
        number = self._agreed()
        if number is None:
            return
        processes = PartialState().num_processes
        launch = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
        recipe = shlex.quote(str(Path(args.output_dir) / RECIPE))
        PartialState().print(
            f"stopped by {signal.Signals(number).name} after step {state.global_step}; continue with: "
            f"{launch} -m reward_recipes.train --config {recipe} --resume_from_checkpoint true",
            flush=True,
        )
        raise Interrupted(128 + number)

    def _agreed(self) -> int | None:
        """The signal that any process got."""
        state = PartialState()
        number = self._interruption.signal or 0
        if state.num_processes > 1:
            number = int(gather(torch.tensor([number], device=state.device)).max())
        return number or None
