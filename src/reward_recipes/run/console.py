"""What a training shows on the terminal: aligned rows and one bar; rows alone in CI and in pipes."""

import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import huggingface_hub.utils as hub
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import logging as transformers_logging

ROWS = 30  # of a run, about
ROWS_A_HEADING = 20
Column = tuple[str, int, str, str]  # its heading, width, name in a row, and format
COLUMNS: Sequence[Column] = (  # with the mark of the best, 79 characters
    ("step", 7, "step", "{:,}"),
    ("epoch", 7, "epoch", "{:.2f}"),
    ("loss", 8, "loss", "{:.4f}"),
    ("accuracy", 9, "accuracy", "{:.1%}"),
    ("eval acc", 9, "eval_accuracy", "{:.1%}"),
    ("gap", 7, "gap", "{:+.1f}"),
    ("rate", 8, "learning_rate", "{:.1e}"),
    ("pairs/s", 8, "pairs_per_second", "{:,.1f}"),
    ("time left", 10, "time_left", "{}"),
)


def is_terminal() -> bool:
    """Whether a person looks on, rather than CI or a file."""
    return sys.stdout.isatty() and sys.stderr.isatty() and not os.environ.get("CI")


def quiet_libraries() -> None:
    """No bars of libraries, but for downloads on a terminal, which can take minutes; nor what only TRL can mend."""
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)  # renamed in transformers 5.23
    downloads = is_terminal() and not hub.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()


def quiet_trainer(trainer: Trainer) -> None:
    """Print no dictionaries and show no bars of Trainer's own."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # another one in notebooks


def use_console(trainer: Trainer) -> None:
    """Show what a trainer does by `Console`, on the main process."""
    quiet_trainer(trainer)
    if trainer.is_world_process_zero():
        trainer.add_callback(Console())


class Rows:
    """Prints aligned rows, above a bar if there is one, and their heading again now and then."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns, self._printed = columns, 0

    def show(self, row: Mapping[str, Any], mark: str = "") -> None:
        """Print a row, whose missing cells stay blank, and what `mark` says of it."""
        if self._printed % ROWS_A_HEADING == 0:
            tqdm.write("".join(f"{heading:>{width}}" for heading, width, _, _ in self._columns))
        cells = (
            f"{shown.format(row[name]) if row.get(name) is not None else '':>{width}}"
            for _, width, name, shown in self._columns
        )
        tqdm.write("".join(cells) + mark)
        sys.stdout.flush()
        self._printed += 1


class Console(TrainerCallback):
    """Prints about 30 rows of the log, at even distances, and keeps a bar below them on a terminal.

    A run of at most 15 evaluations shows each of them, and rows of training between them. A run of more shows only rows
    with an evaluation. The last row is always shown, and each evaluation that is the best so far, with the word `best`.
    """

    def __init__(self) -> None:
        self._row: dict[str, Any] = {}  # of this step, until its evaluation is done
        self._rows = Rows(COLUMNS)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._first = self._shown = state.global_step
        self._start = time.perf_counter()
        hidden = args.disable_tqdm or not is_terminal()
        steps = {"total": state.max_steps, "initial": state.global_step}
        self._bar = tqdm(desc="training", **steps, dynamic_ncols=True, leave=False, disable=hidden)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._bar.set_description("training", refresh=False)
        self._bar.update()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self._bar.set_description("evaluating")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._bar.close()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in state.log_history[-1]:
            self._row = state.log_history[-1]
            if not control.should_evaluate:  # else the evaluation's figures are about to follow
                self._show(args, state, {})

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        self._show(args, state, metrics)

    def _show(self, args: Any, state: TrainerState, metrics: dict[str, float]) -> None:
        row, self._row, step = {"epoch": state.epoch} | self._row | metrics, {}, state.global_step
        best = _is_best(args, state, metrics)
        if not (best or step == state.max_steps or self._is_due(args, state, bool(metrics))):
            return
        left = (time.perf_counter() - self._start) / max(1, step - self._first) * (state.max_steps - step)
        row |= {"step": step, "time_left": tqdm.format_interval(left)}
        if "eval_overfitting_gap" in row:
            row["gap"] = 100 * row["eval_overfitting_gap"]
        self._rows.show(row, "  best" * best)
        self._shown = step

    def _is_due(self, args: Any, state: TrainerState, evaluated: bool) -> bool:
        evaluations = state.max_steps / args.eval_steps if args.eval_strategy == "steps" else 0
        few = evaluations <= ROWS / 2
        spread = state.global_step - self._shown >= state.max_steps / ROWS
        return (evaluated and few) or ((evaluated or few) and spread)


def _is_best(args: Any, state: TrainerState, metrics: dict[str, float]) -> bool:
    value, before = metrics.get(f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"), state.best_metric
    if value is None or not state.global_step:  # the model of step 0 is not saved
        return False
    return before is None or (value > before if args.greater_is_better else value < before)
