"""The training log: one CSV row per logging step, evaluation figures on the row of their step, and the picture."""

import csv
import io
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from reward_recipes.evaluate import plot_training
from reward_recipes.run import LOG, PICTURE, UserError, replacing, report_write_errors

COLUMNS = (
    "step,epoch,train_loss,train_accuracy,eval_loss,eval_accuracy,overfitting_gap,learning_rate,grad_norm,"
    "train_probe_loss,train_probe_accuracy,eval_margin,mean_reward,tokens_seen,pairs_per_second,elapsed_seconds"
).split(",")

FROM_TRAINING = {
    "epoch": "epoch",
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "mean_reward": "mean_reward",
    "tokens_seen": "num_tokens",
}
FROM_EVALUATION = {
    "eval_loss": "eval_loss",
    "eval_accuracy": "eval_accuracy",
    "overfitting_gap": "eval_overfitting_gap",
    "train_probe_loss": "eval_train_probe_loss",
    "train_probe_accuracy": "eval_train_probe_accuracy",
    "eval_margin": "eval_margin",
}


TIMING = ("pairs_per_second", "elapsed_seconds")


class CSVLogCallback(TrainerCallback, ExportableState):
    """Writes `reward_model_log.csv` in the output folder and redraws `training_progress.png` at each evaluation.

    A row is written whole and flushed: at once, or, on a step that evaluates, when the evaluation is done. Only the
    main process writes. A resumed run writes the rows up to its checkpoint anew from what the checkpoint holds. Rows
    that cannot be written (disk full) wait for the next one, with a warning; a picture that cannot is left out.

    Args:
        ceiling: best reachable accuracy, if known, for the picture.
    """

    def __init__(self, ceiling: float | None = None) -> None:
        self.ceiling = ceiling
        self._row: dict[str, Any] | None = None
        self._waiting: list[dict[str, Any]] = []
        self._size = 0  # bytes of the file that are whole rows
        self._drawn: int | None = None
        self._pairs = 0
        self._window_start: float | None = None
        self._start = time.perf_counter()

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps: seconds since the start, and since the window of the next row opened."""
        now = time.perf_counter()
        window = None if self._window_start is None else now - self._window_start
        return {"args": {"ceiling": self.ceiling}, "attributes": {"elapsed": now - self._start, "window": window}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file, or bring it to the checkpoint's step."""
        self._start = time.perf_counter()
        self._path = Path(args.output_dir) / LOG
        rows = {}
        if state.global_step:
            rows = rows_of(state.log_history)
            self._take_up_clocks(state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}))
        self._pairs = next((entry["pairs"] for entry in reversed(state.log_history) if "pairs" in entry), 0)
        if not state.is_world_process_zero:
            return
        for step, timing in _timing(self._path).items():
            if step in rows:
                rows[step] |= timing
        text = _csv(rows.values(), header=True)
        with report_write_errors(self._path.parent), replacing(self._path) as partial:
            partial.write_bytes(text)
        self._size = len(text)

    def _take_up_clocks(self, saved: Mapping[str, float | None]) -> None:
        now = time.perf_counter()
        self._start = now - (saved.get("elapsed") or 0.0)
        self._window_start = None if saved.get("window") is None else now - saved["window"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first step after a row opens the next window, so that evaluation does not count as training time."""
        if self._window_start is None:
            self._window_start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log and evaluate the last step too: it is a candidate for the best model, and the run's final figure."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the training figures of a window; evaluation figures come with `on_evaluate`."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        now = time.perf_counter()
        row = _figures(FROM_TRAINING, logs) | {"step": state.global_step}
        row["elapsed_seconds"] = round(now - self._start, 2)
        if self._window_start is not None:
            row["pairs_per_second"] = round((logs["pairs"] - self._pairs) / (now - self._window_start), 2)
        self._pairs, self._window_start = logs["pairs"], None
        self._row = row
        if not control.should_evaluate:
            self._write()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Complete the row of this step and redraw the picture."""
        if self._row is None:
            return
        self._row |= _figures(FROM_EVALUATION, metrics or {})
        self._write()
        self._draw(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw with a checkpoint that comes without an evaluation."""
        if state.is_world_process_zero and self._drawn != state.global_step:
            self._draw(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Try once more to write what is waiting."""
        if self._waiting:
            self._flush()

    def _write(self) -> None:
        self._waiting.append(self._row)
        self._row = None
        self._flush()

    def _flush(self) -> None:
        """Append the rows that wait, all or none."""
        text = _csv(self._waiting)
        try:
            with self._path.open("r+b") as file:
                file.seek(self._size)
                file.write(text)
                file.truncate()
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._path, self._size)
            # Without a number, so that Python tells it once and not at each row.
            warnings.warn(f"{self._path} could not be written, rows wait: {error.strerror}", stacklevel=2)
            return
        self._size += len(text)
        self._waiting.clear()

    def _draw(self, step: int) -> None:
        self._drawn = step
        draw(self._path.parent, self.ceiling)


class Patience(EarlyStoppingCallback):
    """Early stopping whose count goes on after a resume, and which stays stopped where the run had stopped."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the count that the checkpoint holds."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def draw(output_dir: Path, ceiling: float | None) -> None:
    """Draw a run's log; a picture that cannot be drawn or written is a warning."""
    try:
        plot_training(output_dir / LOG, output_dir / PICTURE, ceiling=ceiling)
    except UserError as error:
        warnings.warn(f"no picture: {error}", stacklevel=2)


def rows_of(history: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The log's rows, by step, from `TrainerState.log_history`; that does not know how long they took."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        step = entry["step"]
        if "loss" in entry:
            rows[step] = _figures(FROM_TRAINING, entry) | {"step": step}
        elif "eval_loss" in entry and step in rows:
            rows[step] |= _figures(FROM_EVALUATION, entry)
    return rows


def _figures(names: Mapping[str, str], entry: Mapping[str, Any]) -> dict[str, Any]:
    return {column: entry.get(name) for column, name in names.items()}


def _csv(rows: Iterable[Mapping[str, Any]], header: bool = False) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _timing(path: Path) -> dict[int, dict[str, str]]:
    """How long the rows of an earlier log took, by step; a row that a kill cut short is left out."""
    if not path.is_file():
        return {}
    with path.open(newline="", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values() and row.keys() == set(COLUMNS)]
    return {int(row["step"]): {name: row[name] for name in TIMING} for row in rows if row["step"].isdigit()}
