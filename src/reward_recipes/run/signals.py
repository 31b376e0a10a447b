"""What SIGTERM and SIGINT do to a run: training ends after the step with a checkpoint; anything else ends at once."""

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
    """A run ended because of a signal; the exit status is 128 and the signal's number."""


class Interruption:
    """Notes the first SIGTERM or SIGINT that comes in `deferred`. Elsewhere, and on a second Ctrl-C, it ends at once.

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
        """While training, a signal waits for the end of the step.

        The same signal may have ended a worker of the data loader, or another process. The run then ends with the
        signal's status instead of a traceback, and leaves its last checkpoint.
        """
        self._deferring = True
        try:
            yield
        except RuntimeError:
            if self.signal is None:
                raise
            raise Interrupted(128 + self.signal) from None
        finally:
            self._deferring = False
        if self.signal is not None:  # it came after the last step, whose checkpoint is there
            raise Interrupted(128 + self.signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring or (self.signal is not None and number == signal.SIGINT):
            raise SystemExit(128 + number)
        self.signal = self.signal or number


class StopOnSignal(TrainerCallback):
    """Ends training after the step, or the evaluation, in which any process got a signal; a checkpoint comes first.

    `stopped_by` is then the number of the signal, on all processes: they agree by a gather of one number per step.
    transformers' own `enable_jit_checkpoint` knows neither SIGINT nor several processes, and ends with status 0.
    """

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption
        self.stopped_by: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint; an evaluation that is due comes before it, as in a run that nothing stops."""
        control.should_save = control.should_save or self._agreed_signal() is not None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop without loading the best model, since the run goes on later. The checkpoint does not hold this wish."""
        self.stopped_by = self._agreed_signal()
        if self.stopped_by is not None:
            control.should_training_stop = True
            args.load_best_model_at_end = False

    def end_run_if_stopped(self, step: int, output_dir: Path) -> None:
        """End the process where training was stopped, and print how to go on.

        Raises:
            Interrupted: on all processes.
        """
        if self.stopped_by is None:
            return
        processes = PartialState().num_processes
        launch = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
        recipe = shlex.quote(str(output_dir / RECIPE))
        PartialState().print(
            f"stopped by {signal.Signals(self.stopped_by).name} after step {step}; continue with: "
            f"{launch} -m reward_recipes.train --config {recipe} --resume_from_checkpoint true",
            flush=True,
        )
        raise Interrupted(128 + self.stopped_by)

    def _agreed_signal(self) -> int | None:
        state = PartialState()
        number = self._interruption.signal or 0
        if state.num_processes > 1:
            number = int(gather(torch.tensor([number], device=state.device)).max())
        return number or None
