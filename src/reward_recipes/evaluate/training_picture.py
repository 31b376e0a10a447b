"""A training's picture, drawn from its CSV log: loss, accuracy, overfitting gap, learning rate and gradient norm."""

import math
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from reward_recipes.evaluate.picture import AS_PERCENT, LEGEND, LEVEL, Style, style_axes, twin_behind
from reward_recipes.evaluate.training_log import OVERFITTING_GAP, TrainingSummary, read_log, summarise
from reward_recipes.run import UserError, expect, output, replacing

LONG_SERIES = 200

# Okabe-Ito colours tell the series apart for colour-blind readers; dashes and markers do it in grey print.
TRAIN: Style = {"label": "train", "color": "#0072B2", "marker": "s", "linestyle": "-"}
PROBE: Style = {"label": "train sample, eval mode", "color": "#009E73", "marker": "^", "linestyle": "--"}
EVAL: Style = {"label": "eval", "color": "#D55E00", "marker": "o", "linestyle": "-"}
GAP: Style = {"label": "train minus eval", "color": "black", "marker": "o", "linestyle": "-"}
RATE: Style = {"label": "learning rate", "color": "black", "marker": "s", "linestyle": "-"}
NORM: Style = {"label": "gradient norm", "color": "#CC79A7", "marker": "o", "linestyle": "--"}
BEST: Style = {"color": "black", "marker": "*", "markersize": 13, "markeredgecolor": "white", "zorder": 5}
NOTE: Style = {"fontsize": 8.5, "color": "0.2"}
# The best place for a legend inside a panel does not heed the lines of a twin axis.
ABOVE: Style = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0, "ncols": 2}


def plot_training(log_path: Path | str, output_path: Path | str, ceiling: float | None = None) -> TrainingSummary:
    """Draw a log, which may still be growing, as a PNG of four panels and return what it says.

    The picture is replaced in one move, and its folder made if need be. `ceiling` is the best reachable
    accuracy, a fraction, known only for synthetic data.

    Raises:
        UserError: the log or an argument is unusable, or the picture cannot be written.
    """
    output = Path(output_path)
    expect(output.suffix.lower() == ".png", "output", "a file that ends in .png", str(output))
    expect(ceiling is None or 0 < ceiling <= 1, "ceiling", "a fraction such as 0.75", ceiling)
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
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as partial:
            figure.savefig(partial, format="png")
    except OSError as error:
        raise UserError(f"expected to write {output}, found: {error.strerror}; choose another") from error
    return summary


def _line(axes: Axes, log: pd.DataFrame, column: str, style: Style, smooth: str = "") -> None:
    """Draw one column; a long one faintly, under its rolling `smooth` ("mean" or "median") if given."""
    data = log[["step", column]].dropna()
    label, values = style["label"], data[column]
    if smooth and len(data) > LONG_SERIES:
        axes.plot(data["step"], values, color=style["color"], alpha=0.25, linewidth=0.6)
        rows = len(data) // 40
        label += f" ({smooth} of {rows} rows)"
        values = values.rolling(rows, min_periods=1, center=True).agg(smooth)
    if len(data):
        every = math.ceil(len(data) / 14)
        axes.plot(data["step"], values, linewidth=1.5, markersize=4, markevery=every, **style | {"label": label})


def _curves(axes: Axes, log: pd.DataFrame, kind: str) -> None:
    _line(axes, log, f"train_{kind}", TRAIN, smooth="mean")
    _line(axes, log, f"train_probe_{kind}", PROBE)
    _line(axes, log, f"eval_{kind}", EVAL)


def _finish(axes: Axes, log: pd.DataFrame, title: str, ylabel: str, twin: Axes | None = None) -> None:
    style_axes(axes, title, "step", ylabel, grid=twin is None, pad=19)  # One grid cannot serve two scales.
    axes.set_xlim(0, 1.02 * float(np.fmax(1, log["step"].max())))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    handles = [line for part in (axes, twin) if part for line in part.get_legend_handles_labels()[0]]
    if handles:
        axes.legend(handles=handles, framealpha=0.85, **LEGEND, **(ABOVE if twin else {}))
    else:
        axes.text(0.5, 0.4, "nothing logged yet", transform=axes.transAxes, ha="center", **NOTE)


def _draw_loss(axes: Axes, log: pd.DataFrame, summary: TrainingSummary) -> None:
    _curves(axes, log, "loss")
    title = "(a) Loss"
    if summary.best_loss is not None:
        axes.plot(summary.best_loss_step, summary.best_loss, linestyle="none", label="lowest", **BEST)
        title = f"(a) Eval loss is lowest, {summary.best_loss:.4f}, at step {summary.best_loss_step:,}"
    _finish(axes, log, title, "loss per pair (nats)")


def _draw_accuracy(axes: Axes, log: pd.DataFrame, summary: TrainingSummary, ceiling: float | None) -> None:
    _curves(axes, log, "accuracy")
    title = "(b) Accuracy"
    if summary.best_accuracy is not None:
        axes.plot(summary.best_step, summary.best_accuracy, linestyle="none", label="best", **BEST)
        title = f"(b) Eval accuracy is best, {summary.best_accuracy:.2%}, at step {summary.best_step:,}"
    levels = {"chance": (0.5, ":")} | ({} if ceiling is None else {"ceiling": (ceiling, (0, (7, 3)))})
    for name, (level, dashes) in levels.items():
        axes.axhline(level, linestyle=dashes, **LEVEL)
        note = f"{name}\n{100 * level:.4g}%"
        axes.text(1.01, level, note, transform=axes.get_yaxis_transform(), va="center", **NOTE)
    axes.yaxis.set_major_formatter(AS_PERCENT)
    _finish(axes, log, title, "pairs ranked correctly")


def _draw_gap(axes: Axes, log: pd.DataFrame, began: int | None) -> None:
    """The gap, on stripes that tell the epochs apart."""
    _line(axes, log.assign(overfitting_gap=100 * log["overfitting_gap"]), "overfitting_gap", GAP)
    title = "(c) Overfitting gap"
    if began is not None:
        title = f"(c) The gap stays above {100 * OVERFITTING_GAP:g} points from step {began:,}"
        axes.axvline(began, color="#D55E00", linewidth=1.5, linestyle="-.", label="overfitting begins")
    axes.axhline(0, linestyle=":", **LEVEL)
    known = log[["step", "epoch"]].dropna()
    # A run may end a step or so into the next epoch; that sliver is no epoch of its own.
    count = max(1, math.ceil(known["epoch"].max() - 0.01)) if len(known) else 0
    ends = np.interp(range(count + 1), [0, *known["epoch"]], [0, *known["step"]])
    every = math.ceil(count / 6)
    for number, (start, end) in enumerate(pairwise(ends), start=1):
        if number % 2 == 0:
            axes.axvspan(start, end, color="0.93", linewidth=0, zorder=0)
        if number % every == 0 and (end - start) * every > 0.1 * ends[-1]:
            middle = (start + end) / 2
            axes.text(middle, 1.015, f"epoch {number}", transform=axes.get_xaxis_transform(), ha="center", **NOTE)
    _finish(axes, log, title, "accuracy gap (percentage points)")


def _draw_rate(axes: Axes, log: pd.DataFrame) -> None:
    norms = twin_behind(axes)  # The noisy norms would hide the learning rate.
    norms.set_yscale("log")
    positive = log["grad_norm"].where(log["grad_norm"] > 0)
    _line(norms, log.assign(grad_norm=positive), "grad_norm", NORM, smooth="median")
    norms.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norms.yaxis.set_minor_locator(NullLocator())
    norms.yaxis.set_major_formatter("{x:g}")
    norms.set_ylabel("gradient norm (log scale)")
    _line(axes, log, "learning_rate", RATE)
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}".replace("e-0", "e-"))
    _finish(axes, log, "(d) Learning rate and gradient norm", "learning rate", twin=norms)


def draw_training(output_dir: Path, ceiling: float | None) -> None:
    """Draw the log of the run in `output_dir`; a picture that cannot be drawn or written is a warning."""
    try:
        plot_training(output_dir / output.LOG, output_dir / output.PICTURE, ceiling=ceiling)
    except UserError as error:
        warnings.warn(f"no picture: {error}", stacklevel=2)
