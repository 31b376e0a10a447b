"""The training log: one CSV row per logging step, evaluation figures on the row of their step, and the picture."""

import csv
import time
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reward_recipes.errors import UserError
from reward_recipes.output import LOG, PICTURE
from reward_recipes.plot_training import plot_training

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


class CSVLogCallback(TrainerCallback):
    """Writes `reward_model_log.csv` in the output folder and redraws `training_progress.png` at each evaluation.

    A row is written whole and flushed: at once, or, on a step that evaluates, when the evaluation is done. Only the
    main process writes. A resumed run keeps the rows up to its checkpoint and goes on from there.

    Args:
        ceiling: best reachable accuracy, if known, for the picture.
    """

    def __init__(self, ceiling: float | None = None) -> None:
        self.ceiling = ceiling
        self._row: dict[str, Any] | None = None
        self._pairs = 0
        self._window_start: float | None = None
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file, or cut it back to the checkpoint's step."""
        self._start = time.perf_counter()
        if not state.is_world_process_zero:
            return
        self._path = Path(args.output_dir) / LOG
        kept = []
        if state.global_step and self._path.exists():
            with self._path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if _step(row) <= state.global_step]
            self._start -= float(kept[-1]["elapsed_seconds"]) if kept else 0.0
        partial = self._path.with_name(f".{LOG}.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(self._path)
        self._pairs = next((entry["pairs"] for entry in reversed(state.log_history) if "pairs" in entry), 0)

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
        row = {column: logs.get(name) for column, name in FROM_TRAINING.items()}
        row |= {"step": state.global_step, "elapsed_seconds": round(now - self._start, 2)}
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
        self._row |= {column: (metrics or {}).get(name) for column, name in FROM_EVALUATION.items()}
        self._write()
        try:
            plot_training(self._path, self._path.with_name(PICTURE), ceiling=self.ceiling)
        except UserError as error:  # a picture is not worth a run
            warnings.warn(f"no picture: {error}", stacklevel=2)

    def _write(self) -> None:
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(self._row)
        self._row = None


def _step(row: dict[str, str]) -> float:
    """The step of a row; a half-written one sorts after every checkpoint and is dropped."""
    complete = row["step"].isdigit() and None not in row.values()
    return int(row["step"]) if complete else float("inf")
