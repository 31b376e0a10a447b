"""What ends a run early (a signal, a deadline, patience), and what does not: a tracker that fails."""

import shlex
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from reward_recipes.run.errors import expect
from reward_recipes.run.output import RECIPE

AT_START = ("on_init_end", "on_train_begin")  # a tracker that cannot start is a mistake to mend at once


class StopOnSignal(TrainerCallback):
    """Ends training after the step, or the evaluation, in which any process got a signal or its time was up.

    A checkpoint comes first. A signal waits only while training is `deferred`. Elsewhere, and on a second Ctrl-C, it
    ends the process at once. All exit statuses are 128 and the signal's number. (transformers' `enable_jit_checkpoint`
    knows neither SIGINT nor several processes, and ends with status 0.)
    """

    def __init__(self) -> None:
        self._got: int | None = None  # by this process
        self._stopped_by: int | None = None  # the same on all processes: they agree by a gather of one number per step
        self._deferring = False
        self._made, self._hours, self._late = time.monotonic(), float("inf"), False

    def end_after(self, hours: float | None) -> None:
        """End as by SIGTERM once so many hours have passed since this object was made; None sets no deadline."""
        expect(hours is None or hours > 0, "max_run_time", "hours above 0", hours)
        self._hours = float("inf") if hours is None else hours

    def listen(self) -> None:
        """Take over both signals from Python's own handlers; in the main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring or (self._got is not None and number == signal.SIGINT):
            raise SystemExit(128 + number)
        self._got = self._got or number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it, a signal waits for the end of the step, where the process then ends.

        The same signal may have ended a worker of the data loader, or another process. The run then ends with the
        signal's status instead of a traceback, and leaves its last checkpoint.
        """
        self._deferring = True
        try:
            yield
        except RuntimeError:
            if self._got is None:
                raise
        finally:
            self._deferring = False
        if self._got is not None:  # also after the last step, whose checkpoint is there
            raise SystemExit(128 + self._got)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint; an evaluation that is due comes before it, as in a run that nothing stops."""
        control.should_save = control.should_save or self._agreed_signal() is not None

    on_evaluate = on_step_end  # a signal that came in an evaluation does not wait for one more step

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop; the checkpoint does not hold this wish, since the run goes on later."""
        self._stopped_by = self._agreed_signal()
        if self._stopped_by is not None:
            control.should_training_stop = True

    def end_run_if_stopped(self, step: int, output_dir: Path) -> None:
        """End the process, on all of them, where training was stopped, and print how to go on."""
        if self._stopped_by is None:
            return
        state = PartialState()
        launch = "python" if state.num_processes == 1 else f"accelerate launch --num_processes {state.num_processes}"
        if state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            launch += " --config_file ENGINE.yaml"
        name = f"max_run_time={self._hours:g}" if self._late else signal.Signals(self._stopped_by).name
        recipe = shlex.quote(str(output_dir / RECIPE))
        state.print(
            f"stopped by {name} after step {step}; continue with: "
            f"{launch} -m reward_recipes.train --config {recipe} --resume_from_checkpoint true",
            flush=True,
        )
        raise SystemExit(128 + self._stopped_by)

    def _agreed_signal(self) -> int | None:
        state = PartialState()
        if self._got is None and time.monotonic() - self._made >= 3600 * self._hours:
            self._got, self._late = int(signal.SIGTERM), True
        number = self._got or 0
        if state.num_processes > 1:
            number = int(gather(torch.tensor([number], device=state.device)).max())
        return number or None


class Patience(EarlyStoppingCallback):
    """Early stopping whose count goes on after a resume, and which stays stopped where the run had stopped."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def keep_training_if_trackers_fail(callbacks: Iterable[TrainerCallback], report_to: list[str]) -> None:
    """Turn what the callbacks of the trackers in `report_to` raise, from the first step on, into warnings."""
    trackers = get_reporting_integration_callbacks(report_to)
    events = [name for name in dir(TrainerCallback) if name.startswith("on_") and name not in AT_START]
    for callback in callbacks:
        if type(callback) in trackers:
            for name in events:
                setattr(callback, name, partial(_warn_if_it_fails, type(callback).__name__, getattr(callback, name)))


def _warn_if_it_fails(name: str, event: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return event(*args, **kwargs)
    except Exception as error:  # a tracker may raise anything
        warnings.warn(f"{name} failed and training goes on: {type(error).__name__}: {error}", stacklevel=2)
