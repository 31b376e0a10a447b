"""The training log: one CSV row per logging step, evaluation figures on the row of their step, and the picture."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from reward_recipes.evaluate import draw_training
from reward_recipes.run import CSVFile, output, report_write_errors

# Columns of the file, and the names of those that the log history calls otherwise.
COLUMNS = (
    *("step", "epoch", "train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "overfitting_gap"),
    *("learning_rate", "grad_norm", "train_probe_loss", "train_probe_accuracy", "eval_margin", "mean_reward"),
    *("tokens_seen", "pairs_per_second", "elapsed_seconds"),
)
HISTORY_NAMES = {
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "overfitting_gap": "eval_overfitting_gap",
    "train_probe_loss": "eval_train_probe_loss",
    "train_probe_accuracy": "eval_train_probe_accuracy",
    "tokens_seen": "num_tokens",
}
DRAW_FIRST = 30  # seconds after the start
DRAW_EVERY = 50  # times as long as it takes to draw


class CSVLogCallback(TrainerCallback, ExportableState):
    """Writes `reward_model_log.csv` in the output folder and redraws `training_progress.png` along with it.

    The file shows what `TrainerState.log_history` holds: a row is written whole, once its step's evaluation is done,
    and a resumed run writes the rows of its checkpoint anew. Rows that cannot be written (disk full) are written with
    the next one, after a warning. The picture is drawn after half a minute, then as often as costs 2% of the time, and
    at the end. Only the main process writes. `ceiling` is the best reachable accuracy, if known, for the picture;
    `clear` makes room for the run once all that it needs is made.
    """

    def __init__(self, ceiling: float | None = None, clear: Callable[[], None] | None = None) -> None:
        self.ceiling, self._clear = ceiling, clear
        self.begun = False
        self._file: CSVFile | None = None  # while training, on the main process
        self._written = 0  # entries of the log history that stand in the file
        self._next_picture = 0.0  # not drawn before this time
        self._pairs = 0
        self._start = time.perf_counter()
        self._window_start: float | None = None

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps: the two clocks, in seconds, and the pairs trained on up to the last row."""
        now = time.perf_counter()
        window = None if self._window_start is None else now - self._window_start
        return {"args": {}, "attributes": {"elapsed": now - self._start, "window": window, "pairs": self._pairs}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        now, window = time.perf_counter(), saved.get("window")
        self._start, self._next_picture = now - saved.get("elapsed", 0.0), now + DRAW_FIRST
        self._window_start = None if window is None else now - window
        self._pairs = saved.get("pairs", 0)
        self.begun = True
        if state.is_world_process_zero:
            if self._clear:
                self._clear()
            folder = Path(args.output_dir)
            with report_write_errors(folder):
                self._file = CSVFile(folder / output.LOG, COLUMNS, rows_of(state.log_history))
            self._written = len(state.log_history)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The first step after a row opens the next window, so that evaluation does not count as training time."""
        if self._window_start is None:
            self._window_start = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log and evaluate the last step too: it is a candidate for the best model, and the run's final figure."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        row = state.log_history[-1]
        if self._file is None or "loss" not in row:
            return
        now = time.perf_counter()
        row["elapsed_seconds"] = round(now - self._start, 2)
        if self._window_start is not None:
            row["pairs_per_second"] = round((row["pairs"] - self._pairs) / (now - self._window_start), 2)
        self._pairs, self._window_start = row["pairs"], None
        if not control.should_evaluate:  # else the evaluation's figures are about to follow
            self._write(state)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._file is not None:
            self._write(state)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Try once more to write what is missing; what is evaluated later is no part of the log."""
        if self._file is not None:
            self._next_picture = 0.0
            self._write(state)
            self._file = None

    def _write(self, state: TrainerState) -> None:
        try:
            self._file.append(rows_of(state.log_history[self._written :]))
        except OSError as error:
            # Without a number, so that Python shows it once and not at each row.
            warnings.warn(f"{self._file.path} could not be written, rows wait: {error.strerror}", stacklevel=2)
        else:
            self._written = len(state.log_history)
        if (start := time.perf_counter()) >= self._next_picture:
            draw_training(self._file.path.parent, self.ceiling)
            self._next_picture = start + DRAW_EVERY * (time.perf_counter() - start)


def rows_of(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The log's rows, one a step, from `TrainerState.log_history`."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "loss" in entry or "eval_loss" in entry:
            by_step.setdefault(entry["step"], {}).update(entry)
    return [{name: step.get(HISTORY_NAMES.get(name, name)) for name in COLUMNS} for step in by_step.values()]
