"""How a policy's training went: a CSV with a row per update, and a picture of it."""

import csv
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerState

from reward_recipes.run import replacing

# The log's columns: TRL's names for each, PPO's first and RLOO's second. The score is a mean, penalties included.
SOURCES = {
    "score": ("objective/scores", "reward"),
    "kl": ("objective/kl", "kl"),
    "response_length": ("response_length", "completions/mean_length"),
    "missing_eos": ("missing_eos", "completions/clipped_ratio"),
    "entropy": ("objective/entropy", "entropy"),
    "policy_loss": ("loss/policy_avg", "loss"),
    "value_loss": ("loss/value_avg",),
    "learning_rate": ("lr", "learning_rate"),
}
PANELS = {
    "score": "mean score",
    "kl": "KL divergence from the start",
    "response_length": "tokens of a reply",
    "missing_eos": "replies without EOS (share)",
}
REDRAW = 10  # rows between pictures


class PolicyLogCallback(TrainerCallback):
    """Writes a row for each of TRL's log entries, and redraws the picture every few rows and at the end.

    Args:
        log: CSV to write; the picture stands beside it as `.png`.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._rows = 0
        self._start = time.perf_counter()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the file."""
        if state.is_world_process_zero:
            self.log.write_text(",".join(("step", *SOURCES, "elapsed_seconds")) + "\n")

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Write the row of an update."""
        values = [next((logs[name] for name in names if name in logs), None) for names in SOURCES.values()]
        if not state.is_world_process_zero or values[0] is None:  # RLOO's last entry holds no score
            return
        elapsed = round(time.perf_counter() - self._start, 2)
        self._rows += 1
        with report_log_errors(self.log):
            with self.log.open("a", newline="") as file:
                csv.writer(file).writerow([state.global_step, *values, elapsed])
            if self._rows % REDRAW == 0:
                draw_policy_log(self.log)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw the whole run."""
        if state.is_world_process_zero and self._rows:
            with report_log_errors(self.log):
                draw_policy_log(self.log)


@contextmanager
def report_log_errors(log: Path) -> Iterator[None]:
    """Turn an unusable log or picture into a warning, because the policy is saved only after the training."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(f"{log} could not be written or drawn, and training goes on: {error}", stacklevel=2)


def draw_policy_log(log: Path) -> None:
    """Draw score, KL, reply length and missing EOS by update, as a PNG beside the log."""
    table = pd.read_csv(log, dtype=float)
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        axes.plot(table["step"], table[column], color="#0072B2", linewidth=1, alpha=0.4, marker=".", markersize=4)
        smooth = table[column].rolling(max(1, len(table) // 10), min_periods=1, center=True).mean()
        axes.plot(table["step"], smooth, color="black", linewidth=1.8, label="running mean")
        axes.set(xlabel="update", ylabel=label)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(edgecolor="none", loc="upper left")
    figure.axes[3].set_ylim(-0.05, 1.05)
    with replacing(log.with_suffix(".png")) as partial:
        figure.savefig(partial, format="png", dpi=150)
