"""An evaluation's picture: calibration, margins, accuracy by subset and by dialogue length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reward_recipes.evaluate.markdown import LONGER, percent, with_interval

# What all pictures share: matplotlib's settings while they are drawn.
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True}
STYLE |= {"axes.titlelocation": "left", "axes.titlesize": 10.5, "axes.titleweight": "bold"}
STYLE |= {"grid.color": "0.9", "grid.linewidth": 0.6}
STYLE |= {"legend.edgecolor": "none", "legend.fontsize": 8.5, "legend.framealpha": 1}  # no line through a label
# Okabe-Ito colours; hatches and markers tell the same in grey print.
Style = dict[str, Any]
RIGHT: Style = {"color": "#0072B2", "label": "right"}
WRONG: Style = {"color": "#D55E00", "label": "wrong", "hatch": "///", "edgecolor": "white", "linewidth": 0}
TIES: Style = {"color": "0.5", "label": "tie"}
DOTS: Style = {"color": "#0072B2", "marker": "o", "markersize": 5}
LEVEL: Style = {"color": "0.3", "linewidth": 1.1}
AS_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g}%")


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Draw four panels as a PNG from what `evaluation.evaluate` returns."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 8.2), dpi=150, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        calibration, margins, subsets, lengths = figure.subplots(2, 2).flat
        _draw_calibration(calibration, report)
        _draw_margins(margins, report)
        _draw_subsets(subsets, report)
        _draw_lengths(lengths, report)
        figure.savefig(path, format="png")


def twin_behind(axes: Axes) -> Axes:
    """A second y axis, at the right, drawn behind the panel's own lines; no grid, since one cannot serve two scales."""
    twin = axes.twinx()
    twin.spines["right"].set_visible(True)
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)
    for part in (axes, twin):
        part.grid(False)
    return twin


def _draw_calibration(axes: Axes, report: dict[str, Any]) -> None:
    bins = [part for part in report["reliability"] if part["pairs"]]
    low, high, pairs, confidence, accuracy = zip(*(part.values() for part in bins), strict=True)
    counts = twin_behind(axes)
    counts.bar(low, pairs, high[0] - low[0], align="edge", color="0.88")
    counts.set(ylim=(0, 3 * max(pairs)), yticks=[0, max(pairs)], yticklabels=["0", f"{max(pairs):,}"])
    counts.set_ylabel("pairs (bars)", y=1 / 6)
    axes.plot([0.5, 1], [0.5, 1], linestyle="--", label="as sure as right", **LEVEL)
    axes.plot(confidence, accuracy, label="model", **DOTS)
    axes.xaxis.set_major_formatter(AS_PERCENT)
    axes.yaxis.set_major_formatter(AS_PERCENT)
    axes.set(title=f"(a) Calibration error {percent(report['ece'])}", xlim=(0.5, 1), ylim=(0, 1.03))
    axes.set(xlabel="confidence, sigmoid(|margin|)", ylabel="accuracy")
    axes.legend(loc="upper left")


def _draw_margins(axes: Axes, report: dict[str, Any]) -> None:
    edges, pairs = map(np.array, report["margin_histogram"].values())
    starts, widths, half = edges[:-1], np.diff(edges), len(pairs) // 2
    ties = round(report["ties"] * report["pairs"])
    right = pairs[half:].copy()
    right[0] -= ties  # a margin of 0 falls into the first bin from 0 on
    axes.bar(starts[:half], pairs[:half], widths[:half], align="edge", **WRONG)
    axes.bar(starts[half:], right, widths[half:], align="edge", **RIGHT)
    if ties:
        axes.bar(starts[half], ties, widths[half], bottom=right[0], align="edge", **TIES)
    axes.axvline(0, **LEVEL)
    axes.set(title=f"(b) Mean margin {report['mean_margin']:.3g}", xlabel="margin, chosen minus rejected score")
    axes.set_ylabel("pairs")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")


def _dots_and_bars(parts: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The (n,) accuracies and the (2, n) lengths of their error bars, NaN where there is no interval."""
    accuracy = np.array([part["accuracy"] for part in parts])
    low, high = np.array([part["accuracy_ci95"] or [np.nan, np.nan] for part in parts]).T
    return accuracy, np.maximum(0, [accuracy - low, high - accuracy])


def _draw_subsets(axes: Axes, report: dict[str, Any]) -> None:
    parts = {"all pairs": report, **report["subsets"]}
    if report["pairs_equal_length"]:
        names = ("pairs", "accuracy", "accuracy_ci95")
        parts["replies of equal length"] = {name: report[f"{name}_equal_length"] for name in names}
    accuracy, bars = _dots_and_bars(list(parts.values()))
    axes.errorbar(accuracy, range(len(parts)), xerr=bars, linestyle="none", capsize=3, **DOTS)
    axes.axvline(0.5, linestyle=":", label="a coin", **LEVEL)
    axes.axvline(report["length_baseline_accuracy"], color="#D55E00", linestyle="--", label=LONGER)
    labels = [f"{name} ({part['pairs']:,})" for name, part in parts.items()]
    axes.set_yticks(range(len(parts)), labels, fontsize=9 if len(parts) <= 12 else 6.5)
    axes.margins(y=0.1)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(AS_PERCENT)
    axes.set_title(f"(c) Accuracy {with_interval(report['accuracy'], report['accuracy_ci95'])}")
    axes.set_xlabel("accuracy, 95% interval by prompt")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _draw_lengths(axes: Axes, report: dict[str, Any]) -> None:
    parts = report["by_dialogue_length"]
    accuracy, bars = _dots_and_bars(parts)
    axes.errorbar(range(len(parts)), accuracy, yerr=bars, linestyle="none", capsize=3, **DOTS)
    axes.axhline(0.5, linestyle=":", **LEVEL)
    labels = [f"to {part['high']:,}\n({part['pairs']:,})" for part in parts]
    axes.set_xticks(range(len(parts)), labels, fontsize=8.5)
    axes.margins(x=0.1)
    axes.yaxis.set_major_formatter(AS_PERCENT)
    axes.set(title="(d) Accuracy by dialogue length", xlabel="tokens of the longer side (pairs)", ylabel="accuracy")
