"""Draw how a reward model's training went from its CSV log, and say it in one line.

Run it as `python -m reward_recipes.plot_training reward_model_log.csv`, during the training or after it.
"""

import argparse
import csv
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from reward_recipes.run import UserError

NEEDED_COLUMNS = (
    *("step", "epoch", "train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "overfitting_gap"),
    *("learning_rate", "grad_norm", "train_probe_loss", "train_probe_accuracy"),
)
OVERFITTING_GAP = 0.05
LONG_SERIES = 200

# Okabe-Ito colours tell the series apart for colour-blind readers; dashes and markers do it in grey print.
Style = dict[str, Any]
TRAIN: Style = {"label": "train", "color": "#0072B2", "marker": "s", "linestyle": "-"}
PROBE: Style = {"label": "train sample, eval mode", "color": "#009E73", "marker": "^", "linestyle": "--"}
EVAL: Style = {"label": "eval", "color": "#D55E00", "marker": "o", "linestyle": "-"}
GAP: Style = {"label": "train minus eval", "color": "black", "marker": "o", "linestyle": "-"}
RATE: Style = {"label": "learning rate", "color": "black", "marker": "s", "linestyle": "-"}
NORM: Style = {"label": "gradient norm", "color": "#CC79A7", "marker": "o", "linestyle": "--"}
BEST: Style = {"color": "black", "marker": "*", "markersize": 13, "markeredgecolor": "white", "zorder": 5}
LEVEL: Style = {"color": "0.3", "linewidth": 1.1}
NOTE: Style = {"fontsize": 8.5, "color": "0.2"}
# The best place for a legend inside a panel does not heed the lines of a twin axis.
ABOVE: Style = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0, "ncols": 2}


@dataclass(frozen=True)
class TrainingSummary:
    """What a log says: steps are optimizer steps, accuracies and gaps fractions; None where unknown.

    `best_loss` is the lowest eval loss, which seldom falls on `best_step`, the step of the best accuracy.
    """

    evaluations: int = 0
    best_step: int | None = None
    best_accuracy: float | None = None
    best_loss_step: int | None = None
    best_loss: float | None = None
    final_step: int | None = None
    final_accuracy: float | None = None
    final_gap: float | None = None
    overfitting_began: int | None = None

    def __str__(self) -> str:
        """Return the summary as one line for people."""
        if self.evaluations == 0:
            return "no evaluation in the log yet: the best step and overfitting are unknown"
        final = f"eval accuracy {self.final_accuracy:.2%} at step {self.final_step:,}"
        gap = "gap unknown" if self.final_gap is None else f"gap {100 * self.final_gap:+.1f} points"
        if self.evaluations == 1:
            return f"one evaluation so far: {final}, {gap}; too early to speak of overfitting"
        began = f"no overfitting seen (the gap does not stay above {100 * OVERFITTING_GAP:g} points)"
        if self.overfitting_began is not None:
            began = f"overfitting began at step {self.overfitting_began:,}"
        best = f"best step {self.best_step:,} with eval accuracy {self.best_accuracy:.2%}"
        return f"{best}; final {final}; final {gap}; {began}"


def read_log(path: Path | str) -> pd.DataFrame:
    """Return a log as floats, one row per logging step; empty and non-finite cells are NaN.

    A last line that is still being written is dropped.

    Raises:
        UserError: the file cannot be read, lacks columns or has a row that does not fit them.
    """
    mend = "pass the reward_model_log.csv that a training run wrote"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = [row for row in csv.reader(text.split("\n")) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        found = getattr(error, "strerror", None) or "a file that is not CSV text"
        raise UserError(f"expected a training log at {path}, found: {found}; {mend}") from error
    header, body = (rows[0], rows[1:]) if rows else ([], [])
    if missing := [name for name in NEEDED_COLUMNS if name not in header]:
        found = f"{len(header)} columns, without {', '.join(missing)}"
        raise UserError(f"expected a training log at {path}, found: {found}; {mend}")
    if body and len(body[-1]) < len(header):
        body.pop()
    elif body and not text.endswith("\n"):
        body[-1][-1] = ""  # The line may have been cut within this number.
    numbers = [_numbers(row, header, f"row {place} of {path}") for place, row in enumerate(body, start=1)]
    return pd.DataFrame(numbers, columns=header, dtype=float)


def _numbers(row: list[str], header: list[str], where: str) -> list[float]:
    try:
        values = [float(cell or "nan") for cell in row]
    except ValueError as error:
        raise UserError(f"expected numbers in {where}, found: {error}; mend or delete that row") from error
    if len(values) != len(header) or not math.isfinite(values[header.index("step")]):
        found = f"{len(values)} cells: {','.join(row)[:60]}"
        raise UserError(f"expected {len(header)} cells and a step in {where}, found {found}; delete it")
    return [value if math.isfinite(value) else math.nan for value in values]


def summarise(log: pd.DataFrame) -> TrainingSummary:
    """Sum up a log from `read_log`; of equal best values the first counts, as when transformers saves."""
    evals = log[log["eval_accuracy"].notna()].set_index("step")
    if evals.empty:
        return TrainingSummary()
    accuracy, losses, gap = evals["eval_accuracy"], evals["eval_loss"].dropna(), evals["overfitting_gap"]
    best_step = accuracy.idxmax()
    after = gap[gap.index > best_step]
    lasting = after[after[::-1].cummin()[::-1] > OVERFITTING_GAP]
    return TrainingSummary(
        evaluations=len(evals),
        best_step=int(best_step),
        best_accuracy=float(accuracy.max()),
        best_loss_step=None if losses.empty else int(losses.idxmin()),
        best_loss=None if losses.empty else float(losses.min()),
        final_step=int(evals.index[-1]),
        final_accuracy=float(accuracy.iloc[-1]),
        final_gap=None if math.isnan(gap.iloc[-1]) else float(gap.iloc[-1]),
        overfitting_began=None if lasting.empty else int(lasting.index[0]),
    )


def plot_training(log_path: Path | str, output_path: Path | str, ceiling: float | None = None) -> TrainingSummary:
    """Draw a log, which may still be growing, as a PNG of four panels and return what it says.

    The picture is replaced in one move, and its folder made if need be. `ceiling` is the best reachable
    accuracy, a fraction, known only for synthetic data.

    Raises:
        UserError: the log or an argument is unusable, or the picture cannot be written.
    """
    output = Path(output_path)
    if output.suffix.lower() != ".png":
        raise UserError(f"expected an output that ends in .png, found {output}; rename it")
    if ceiling is not None and not 0 < ceiling <= 1:
        raise UserError(f"expected a ceiling between 0 and 1, found {ceiling:g}; give 75% as 0.75")
    log = read_log(log_path)
    summary = summarise(log)
    figure = Figure(figsize=(11, 7.8), dpi=150)
    # Fixed margins: a layout engine draws everything several times, at each evaluation.
    figure.subplots_adjust(left=0.07, right=0.935, bottom=0.07, top=0.93, wspace=0.24, hspace=0.38)
    loss, accuracy, gap, rate = figure.subplots(2, 2).flat
    _draw_loss(loss, log, summary)
    _draw_accuracy(accuracy, log, summary, ceiling)
    _draw_gap(gap, log, summary.overfitting_began)
    _draw_rate(rate, log)
    try:
        _save(figure, output)
    except OSError as error:
        raise UserError(f"expected to write {output}, found: {error.strerror}; choose another") from error
    return summary


def _save(figure: Figure, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def _line(axes: Axes, log: pd.DataFrame, column: str, style: Style, smooth: str = "") -> None:
    """Draw one column; a long one faintly, under its rolling `smooth` ("mean" or "median") if given."""
    data = log[["step", column]].dropna()
    style = {"linewidth": 1.5, "markersize": 4, "markevery": math.ceil(len(data) / 14) or 1} | style
    if smooth and len(data) > LONG_SERIES:
        axes.plot(data["step"], data[column], color=style["color"], alpha=0.25, linewidth=0.6)
        rows = len(data) // 40
        style["label"] += f" ({smooth} of {rows} rows)"
        smoothed = data[column].rolling(rows, min_periods=1, center=True).agg(smooth)
        data = data.assign(**{column: smoothed})
    if len(data):
        axes.plot(data["step"], data[column], **style)


def _finish(axes: Axes, log: pd.DataFrame, title: str, ylabel: str, twin: Axes | None = None) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=19)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.set_xlim(0, 1.02 * float(np.fmax(1, log["step"].max())))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if twin is None:  # One grid cannot serve two scales.
        axes.grid(color="0.9", linewidth=0.6)
    handles = [line for part in (axes, twin) if part for line in part.get_legend_handles_labels()[0]]
    if handles:
        place = ABOVE if twin else {}
        axes.legend(handles=handles, edgecolor="none", framealpha=0.85, fontsize=8.5, **place)
    else:
        axes.text(0.5, 0.4, "nothing logged yet", transform=axes.transAxes, ha="center", **NOTE)


def _draw_loss(axes: Axes, log: pd.DataFrame, summary: TrainingSummary) -> None:
    _line(axes, log, "train_loss", TRAIN, smooth="mean")
    _line(axes, log, "train_probe_loss", PROBE)
    _line(axes, log, "eval_loss", EVAL)
    title = "(a) Loss"
    if summary.best_loss is not None:
        axes.plot(summary.best_loss_step, summary.best_loss, linestyle="none", label="lowest", **BEST)
        title = f"(a) Eval loss is lowest, {summary.best_loss:.4f}, at step {summary.best_loss_step:,}"
    _finish(axes, log, title, "loss per pair (nats)")


def _draw_accuracy(axes: Axes, log: pd.DataFrame, summary: TrainingSummary, ceiling: float | None) -> None:
    _line(axes, log, "train_accuracy", TRAIN, smooth="mean")
    _line(axes, log, "train_probe_accuracy", PROBE)
    _line(axes, log, "eval_accuracy", EVAL)
    title = "(b) Accuracy"
    if summary.best_accuracy is not None:
        axes.plot(summary.best_step, summary.best_accuracy, linestyle="none", label="best", **BEST)
        title = f"(b) Eval accuracy is best, {summary.best_accuracy:.2%}, at step {summary.best_step:,}"
    for name, level, dashes in (("chance", 0.5, ":"), ("ceiling", ceiling, (0, (7, 3)))):
        if level is not None:
            axes.axhline(level, linestyle=dashes, **LEVEL)
            note = f"{name}\n{100 * level:.4g}%"
            axes.text(1.01, level, note, transform=axes.get_yaxis_transform(), va="center", **NOTE)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda accuracy, _: f"{100 * accuracy:.4g}%"))
    _finish(axes, log, title, "pairs ranked correctly")


def _draw_gap(axes: Axes, log: pd.DataFrame, began: int | None) -> None:
    _line(axes, log.assign(overfitting_gap=100 * log["overfitting_gap"]), "overfitting_gap", GAP)
    title = "(c) Overfitting gap"
    if began is not None:
        title = f"(c) The gap stays above {100 * OVERFITTING_GAP:g} points from step {began:,}"
        axes.axvline(began, color="#D55E00", linewidth=1.5, linestyle="-.", label="overfitting begins")
    axes.axhline(0, linestyle=":", **LEVEL)
    _shade_epochs(axes, log)
    _finish(axes, log, title, "accuracy gap (percentage points)")


def _shade_epochs(axes: Axes, log: pd.DataFrame) -> None:
    known = log[["step", "epoch"]].dropna()
    if known.empty:
        return
    # A run may end a step or so into the next epoch; that sliver is no epoch of its own.
    count = max(1, math.ceil(known["epoch"].max() - 0.01))
    ends = np.interp(range(count + 1), [0, *known["epoch"]], [0, *known["step"]])
    every = math.ceil(count / 6)
    above = {"transform": axes.get_xaxis_transform(), "ha": "center"} | NOTE
    for number, (start, end) in enumerate(pairwise(ends), start=1):
        if number % 2 == 0:
            axes.axvspan(start, end, color="0.93", linewidth=0, zorder=0)
        if number % every == 0 and (end - start) * every > 0.1 * ends[-1]:
            axes.text((start + end) / 2, 1.015, f"epoch {number}", **above)


def _draw_rate(axes: Axes, log: pd.DataFrame) -> None:
    norms = axes.twinx()
    norms.set_yscale("log")
    positive = log["grad_norm"].where(log["grad_norm"] > 0)
    _line(norms, log.assign(grad_norm=positive), "grad_norm", NORM, smooth="median")
    norms.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norms.yaxis.set_minor_locator(NullLocator())
    norms.yaxis.set_major_formatter(FuncFormatter(lambda norm, _: f"{norm:g}"))
    norms.set_ylabel("gradient norm (log scale)")
    norms.spines["top"].set_visible(False)
    _line(axes, log, "learning_rate", RATE)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}".replace("e-0", "e-")))
    # The twin axis would else hide the learning rate behind the noisy norms.
    axes.set_zorder(norms.get_zorder() + 1)
    axes.patch.set_visible(False)
    _finish(axes, log, "(d) Learning rate and gradient norm", "learning rate", twin=norms)


def main() -> None:
    """Draw the log named on the command line and print its summary."""
    parser = argparse.ArgumentParser(prog="python -m reward_recipes.plot_training", description=__doc__)
    parser.add_argument("log", type=Path, help="the reward_model_log.csv of a training run")
    parser.add_argument("--output", type=Path, help="PNG to write (training_progress.png beside the log)")
    parser.add_argument("--ceiling", type=float, help="best reachable accuracy, a fraction, if it is known")
    arguments = parser.parse_args()
    output = arguments.output or arguments.log.with_name("training_progress.png")
    print(plot_training(arguments.log, output, arguments.ceiling))
