"""How a policy's training went: a CSV with a row per update, and a picture of it."""

import time
import warnings
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
    """Writes the CSV called `log` in the output folder, a row for each of TRL's log entries.

    Its picture, of the same name as `.png`, is drawn every few rows and at the end.
    """

    def __init__(self, log: str) -> None:
        self._log = log
        self._rows: list[dict[str, Any]] = []
        self._start = time.perf_counter()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Write the row of an update."""
        row = {column: next((logs[name] for name in names if name in logs), None) for column, names in SOURCES.items()}
        if row["score"] is not None:  # RLOO's last entry holds none
            elapsed = round(time.perf_counter() - self._start, 2)
            self._rows.append({"step": state.global_step, **row, "elapsed_seconds": elapsed})
            self._write(args, state, draw=len(self._rows) % REDRAW == 0)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw the whole run."""
        self._write(args, state, draw=True)

    def _write(self, args: Any, state: TrainerState, draw: bool) -> None:
        """What cannot be written is a warning, because the policy is saved only after the training."""
        if not state.is_world_process_zero or not self._rows:
            return
        table, log = pd.DataFrame(self._rows), Path(args.output_dir) / self._log
        try:
            with replacing(log) as partial:
                table.to_csv(partial, index=False)
            if draw:
                draw_policy_log(table, log.with_suffix(".png"))
        except OSError as error:
            warnings.warn(f"{log} could not be written or drawn, and training goes on: {error}", stacklevel=2)


def draw_policy_log(table: pd.DataFrame, path: Path) -> None:
    """Draw score, KL, reply length and missing EOS by update, as a PNG."""
    table = table.astype(float)  # what TRL does not log, such as RLOO's KL at beta 0, is a gap
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
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
