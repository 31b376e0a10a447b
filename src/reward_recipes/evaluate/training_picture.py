"""A training's picture, drawn from its CSV log: loss, accuracy, overfitting gap, learning rate and gradient norm."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from reward_recipes.evaluate.markdown import percent
from reward_recipes.evaluate.picture import AS_PERCENT, LEVEL, STYLE, Style, twin_behind
from reward_recipes.evaluate.training_log import OVERFITTING_GAP, TrainingSummary, read_log, summarise
from reward_recipes.run import expect, replacing

LONG_SERIES = 200

# Okabe-Ito colours tell the series apart for colour-blind readers; dashes and markers do it in grey print.
TRAIN: Style = {"label": "train", "color": "#0072B2", "marker": "s"}
PROBE: Style = {"label": "train sample, eval mode", "color": "#009E73", "marker": "^", "linestyle": "--"}
EVAL: Style = {"label": "eval", "color": "#D55E00", "marker": "o"}
GAP: Style = {"label": "train minus eval", "color": "black", "marker": "o"}
RATE: Style = {"label": "learning rate", "color": "black", "marker": "s"}
NORM: Style = {"label": "gradient norm", "color": "#CC79A7", "marker": "o", "linestyle": "--"}
BEST: Style = {"color": "black", "marker": "*", "markersize": 13, "markeredgecolor": "white", "zorder": 5}


def plot_training(log_path: Path | str, output_path: Path | str, ceiling: float | None = None) -> TrainingSummary:
    """Draw a log, which may still be growing, as a PNG of four panels and return what it says.

    `ceiling` is the best reachable accuracy, a fraction, where it is known. Raises `UserError` for a log or an argument
    that is unusable, `OSError` for a picture that cannot be written; its folder is made if need be.
    """
    picture = Path(output_path)
    expect(picture.suffix.lower() == ".png", "output", "a file that ends in .png", str(picture))
    expect(ceiling is None or 0 < ceiling <= 1, "ceiling", "a fraction such as 0.75", ceiling)
    log = read_log(log_path)
    summary = summarise(log)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.8), dpi=150)
        # Fixed margins: a layout engine draws everything several times, at each evaluation.
        figure.subplots_adjust(left=0.075, right=0.935, bottom=0.07, top=0.95, wspace=0.26, hspace=0.4)
        loss, accuracy, gap, rate = figure.subplots(2, 2).flat
        accuracy.axhline(0.5, linestyle=":", label="chance", **LEVEL)
        if ceiling is not None:
            accuracy.axhline(ceiling, linestyle="--", label="ceiling", **LEVEL)
        _draw_curves(loss, log, "(a) Loss", "loss per pair (nats)", summary.best_loss, summary.best_loss_step)
        _draw_curves(accuracy, log, "(b) Accuracy", "pairs ranked correctly", summary.best_accuracy, summary.best_step)
        _draw_gap(gap, log, summary.overfitting_began)
        _draw_rate(rate, log)
    with replacing(picture) as partial:
        figure.savefig(partial, format="png")
    return summary


def _line(axes: Axes, log: pd.DataFrame, column: str, style: Style, smooth: str = "") -> None:
    """Draw one column; a long one faintly, under its rolling `smooth` ("mean" or "median") if given."""
    values, label = log.set_index("step")[column].dropna(), style["label"]
    if smooth and len(values) > LONG_SERIES:
        axes.plot(values, color=style["color"], alpha=0.25, linewidth=0.6)
        rows = len(values) // 40
        label += f" ({smooth} of {rows} rows)"
        values = values.rolling(rows, min_periods=1, center=True).agg(smooth)
    if len(values):
        axes.plot(values, markersize=4, markevery=math.ceil(len(values) / 14), **style | {"label": label})


def _finish(axes: Axes, log: pd.DataFrame, title: str, ylabel: str, *twins: Axes) -> None:
    last = np.fmax(1, log["step"].max())
    axes.set(title=title, xlabel="step", ylabel=ylabel, xlim=(0, 1.02 * last))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    handles = [line for part in (axes, *twins) for line in part.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, ncols=1 + (len(handles) > 4))


def _draw_curves(axes: Axes, log: pd.DataFrame, title: str, ylabel: str, best: float | None, step: int | None) -> None:
    """Loss or accuracy of training pairs and evaluations, the best evaluation starred."""
    kind = title.split()[1].lower()
    _line(axes, log, f"train_{kind}", TRAIN, smooth="mean")
    _line(axes, log, f"train_probe_{kind}", PROBE)
    _line(axes, log, f"eval_{kind}", EVAL)
    if best is not None:
        axes.plot(step, best, linestyle="none", label="best", **BEST)
        title += f": best in evaluation {percent(best) if kind == 'accuracy' else f'{best:.4f}'}, at step {step:,}"
    _finish(axes, log, title, ylabel)
    if kind == "accuracy":
        axes.yaxis.set_major_formatter(AS_PERCENT)


def _draw_gap(axes: Axes, log: pd.DataFrame, began: int | None) -> None:
    """The gap by step, and by epoch along the upper edge."""
    _line(axes, log.assign(overfitting_gap=100 * log["overfitting_gap"]), "overfitting_gap", GAP)
    title = "(c) Overfitting gap"
    if began is not None:
        title += f": above {100 * OVERFITTING_GAP:g} points from step {began:,}"
        axes.axvline(began, color="#D55E00", linestyle="-.", label="overfitting begins")
    axes.axhline(0, linestyle=":", **LEVEL)
    _finish(axes, log, title, "accuracy gap (percentage points)")
    if (steps := (log["step"] / log["epoch"]).median()) > 0:
        axes.secondary_xaxis("top", functions=(lambda step: step / steps, lambda epoch: epoch * steps))
        axes.set_xlabel("step (above: epoch)")


def _draw_rate(axes: Axes, log: pd.DataFrame) -> None:
    norms = twin_behind(axes)  # The noisy norms would hide the learning rate.
    norms.set(yscale="log", ylabel="gradient norm (log scale)")
    norms.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norms.yaxis.set_major_formatter("{x:g}")
    norms.yaxis.set_minor_locator(NullLocator())
    _line(norms, log.assign(grad_norm=log["grad_norm"].where(log["grad_norm"] > 0)), "grad_norm", NORM, smooth="median")
    _line(axes, log, "learning_rate", RATE)
    _finish(axes, log, "(d) Learning rate and gradient norm", "learning rate", norms)
