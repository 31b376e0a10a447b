"""How a policy's training went: a CSV with a row per update, and a picture of it."""

import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import TrainerCallback, TrainerState

from reward_recipes.policy.samples import Samples
from reward_recipes.run import ROWS, Rows, replacing

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
    "kl": "KL from the start (nats a reply)",
    "response_length": "tokens of a reply",
    "missing_eos": "replies without EOS (share)",
}
REDRAW = 10  # rows between pictures
SHOWN = (  # on the terminal, with what was measured of samples between them
    ("update", 7, "step", "{:,}"),
    ("score", 9, "score", "{:+.3f}"),
    ("KL", 8, "kl", "{:.2f}"),
    ("tokens", 8, "response_length", "{:.1f}"),
    ("no EOS", 8, "missing_eos", "{:.1%}"),
    ("rate", 9, "learning_rate", "{:.1e}"),
)


class PolicyLogCallback(TrainerCallback):
    """Writes the CSV called `log` in the output folder, a row for each of TRL's log entries.

    Every `sample_steps` updates the row gains means over `samples`, drawn after the update: `sample_score` and a column
    for each of their measures. A row of step 0 then holds the policy's at the start. The terminal shows these rows,
    and others a thirtieth of the run apart. The picture, of the log's name as `.png`, is drawn every few rows and at
    the end.
    """

    def __init__(self, log: str, samples: Samples, sample_steps: int) -> None:
        self._log, self._samples, self._sample_steps = log, samples, sample_steps
        self._rows: list[dict[str, Any]] = []
        self._shown = 0  # the update that was shown last
        columns = []
        for name in ["score", *samples.measures] if sample_steps else []:
            heading = "of samples" if name == "score" else name.replace("_", " ")
            columns.append((heading, max(9, len(heading) + 2), f"sample_{name}", " {:+.3f}"))
        self._console = Rows([*SHOWN[:2], *columns, *SHOWN[2:]])
        self._start = time.perf_counter()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the row of the policy as it was before."""
        if self._sample_steps:
            self._rows.append({"step": 0, **self._sampled("before")})

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Write the row of an update."""
        row = {column: next((logs[name] for name in names if name in logs), None) for column, names in SOURCES.items()}
        if row["score"] is not None:  # RLOO's last entry holds none
            if "kl" in logs:  # TRL's RLOO logs it per token, PPO per reply
                row["kl"] = logs["kl"] * row["response_length"]
            elapsed = round(time.perf_counter() - self._start, 2)
            row = {"step": state.global_step, **row, "elapsed_seconds": elapsed}
            if self._sample_steps and state.global_step % self._sample_steps == 0:
                self._samples.take(kwargs["model"], "now")
                row |= self._sampled("now")
            self._rows.append(row)
            self._show(row, state)
            self._write(args, state, draw=len(self._rows) % REDRAW == 0)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw the whole run."""
        self._write(args, state, draw=True)

    def _show(self, row: dict[str, Any], state: TrainerState) -> None:
        step = row["step"]
        due = "sample_score" in row or step - self._shown >= state.max_steps / ROWS or step >= state.max_steps
        if state.is_world_process_zero and due:
            self._console.show(row)
            self._shown = step

    def _sampled(self, when: str) -> dict[str, float]:
        return {f"sample_{name}": mean for name, mean in self._samples.means(when).items()}

    def _write(self, args: Any, state: TrainerState, draw: bool) -> None:
        """What cannot be written is a warning, because the policy is saved only after the training."""
        if not state.is_world_process_zero or not self._rows:
            return
        table, log = pd.DataFrame(self._rows), Path(args.output_dir) / self._log
        try:
            with replacing(log) as partial:
                table.to_csv(partial, index=False)
            if draw:
                draw_policy_log(table, log.with_suffix(".png"), getattr(args, "normalise_rewards", False))
        except OSError as error:
            warnings.warn(f"{log} could not be written or drawn, and training goes on: {error}", stacklevel=2)


def draw_policy_log(table: pd.DataFrame, path: Path, normalised: bool = False) -> None:
    """Draw score, KL, reply length, missing EOS and what was measured of samples by update, as a PNG.

    `normalised` says that the score of training, unlike that of samples, is scaled by the reward model's spread.
    """
    table = table.astype(float).set_index("step")  # what TRL does not log, such as RLOO's KL at beta 0, is a gap
    names = [name.removeprefix("sample_") for name in table if name.startswith("sample_")]
    sampled = {f"sample_{name}": f"mean {name.replace('_', ' ')} of the samples" for name in names}
    panels = {"score": "mean score" + (", normalised" if normalised else ""), **sampled, **PANELS}
    columns = 2 if len(panels) <= 4 else 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.25 * rows), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(rows, columns).flat, panels.items(), strict=False):
        values = table[column].dropna()
        axes.plot(values, color="#0072B2", linewidth=1, alpha=0.4, marker=".", markersize=5, zorder=3)
        smooth = values.rolling(max(1, len(values) // 10), min_periods=1, center=True).mean()
        axes.plot(smooth, color="black", linewidth=1.8, label="running mean")
        axes.set(xlabel="update", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if column == "missing_eos":
            axes.set_ylim(-0.05, 1.05)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    figure.axes[0].legend(edgecolor="none")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
