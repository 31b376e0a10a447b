"""An evaluation's picture: calibration, margins, accuracy by subset and by dialogue length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reward_recipes.evaluate.markdown import percent, with_interval

MOST_SUBSETS = 24

# Okabe-Ito colours; hatches and markers tell the same in grey print.
Style = dict[str, Any]
RIGHT: Style = {"color": "#0072B2", "label": "right"}
WRONG: Style = {"color": "#D55E00", "label": "wrong", "hatch": "///", "edgecolor": "white", "linewidth": 0}
TIES: Style = {"color": "0.5", "label": "tie"}
DOTS: Style = {"color": "#0072B2", "marker": "o", "markersize": 5, "linewidth": 1.5}
LEVEL: Style = {"color": "0.3", "linewidth": 1.1}
LEGEND: Style = {"edgecolor": "none", "fontsize": 8.5}
AS_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g}%")


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Draw four panels as a PNG from what `evaluation.evaluate` returns."""
    figure = Figure(figsize=(11, 8.2), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    calibration, margins, subsets, lengths = figure.subplots(2, 2).flat
    _draw_calibration(calibration, report)
    _draw_margins(margins, report)
    _draw_subsets(subsets, report)
    _draw_lengths(lengths, report)
    figure.savefig(path, format="png")


def style_axes(axes: Axes, title: str, xlabel: str, ylabel: str, grid: bool = True, pad: float | None = None) -> None:
    """Give a panel its title, `pad` points above it, its labels and the look that all pictures share."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=pad)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(color="0.9", linewidth=0.6)


def twin_behind(axes: Axes) -> Axes:
    """A second y axis, drawn behind the panel's own lines."""
    twin = axes.twinx()
    twin.spines["top"].set_visible(False)
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)
    return twin


def _draw_calibration(axes: Axes, report: dict[str, Any]) -> None:
    bins = [part for part in report["reliability"] if part["pairs"]]
    most = max(part["pairs"] for part in bins)
    width = bins[0]["high"] - bins[0]["low"]
    counts = twin_behind(axes)
    counts.bar([part["low"] for part in bins], [part["pairs"] for part in bins], width, align="edge", color="0.88")
    counts.set_ylim(0, 3 * most)
    counts.set_yticks([0, most], ["0", f"{most:,}"])
    counts.set_ylabel("pairs (bars)", y=1 / 6)
    axes.plot([0.5, 1], [0.5, 1], linestyle="--", label="as sure as right", **LEVEL)
    axes.plot([part["confidence"] for part in bins], [part["accuracy"] for part in bins], label="model", **DOTS)
    axes.xaxis.set_major_formatter(AS_PERCENT)
    axes.yaxis.set_major_formatter(AS_PERCENT)
    axes.set_xlim(0.5, 1)
    axes.set_ylim(0, 1.03)
    title = f"(a) Calibration error {percent(report['ece'])}"
    style_axes(axes, title, "confidence, sigmoid(|margin|)", "accuracy", grid=False)
    axes.legend(loc="upper left", **LEGEND)


def _draw_margins(axes: Axes, report: dict[str, Any]) -> None:
    edges, pairs = np.array(report["margin_histogram"]["edges"]), np.array(report["margin_histogram"]["pairs"])
    starts, widths, half = edges[:-1], np.diff(edges), len(pairs) // 2
    ties = round(report["ties"] * report["pairs"])
    right = pairs[half:].copy()
    right[0] -= ties  # a margin of 0 falls into the first bin from 0 on
    axes.bar(starts[:half], pairs[:half], widths[:half], align="edge", **WRONG)
    axes.bar(starts[half:], right, widths[half:], align="edge", **RIGHT)
    if ties:
        axes.bar(starts[half], ties, widths[half], bottom=right[0], align="edge", **TIES)
    axes.axvline(0, **LEVEL)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    style_axes(axes, f"(b) Mean margin {report['mean_margin']:.3g}", "margin, chosen minus rejected score", "pairs")
    axes.legend(loc="upper right", **LEGEND)


def _dots_and_bars(parts: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The (n,) accuracies and the (2, n) lengths of their error bars, NaN where there is no interval."""
    accuracy = np.array([part["accuracy"] for part in parts])
    low, high = np.array([part["accuracy_ci95"] or [np.nan, np.nan] for part in parts]).T
    return accuracy, np.maximum(0, [accuracy - low, high - accuracy])


def _draw_subsets(axes: Axes, report: dict[str, Any]) -> None:
    subsets = sorted(report["subsets"].items(), key=lambda item: -item[1]["pairs"])[:MOST_SUBSETS]
    parts = {"all pairs": report, **dict(sorted(subsets))}
    if report["pairs_equal_length"]:
        names = ("pairs", "accuracy", "accuracy_ci95")
        parts["replies of equal length"] = {name: report[f"{name}_equal_length"] for name in names}
    accuracy, bars = _dots_and_bars(list(parts.values()))
    axes.errorbar(accuracy, range(len(parts)), xerr=bars, linestyle="none", capsize=3, **DOTS)
    axes.axvline(0.5, linestyle=":", label="a coin", **LEVEL)
    axes.axvline(report["length_baseline_accuracy"], color="#D55E00", linestyle="--", label="always the longer reply")
    labels = [f"{name} ({part['pairs']:,})" for name, part in parts.items()]
    axes.set_yticks(range(len(parts)), labels, fontsize=9 if len(parts) <= 12 else 6.5)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(AS_PERCENT)
    title = f"(c) Accuracy {with_interval(report['accuracy'], report['accuracy_ci95'])}"
    style_axes(axes, title, "accuracy, 95% interval by prompt", "")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, **LEGEND)


def _draw_lengths(axes: Axes, report: dict[str, Any]) -> None:
    parts = report["by_dialogue_length"]
    accuracy, bars = _dots_and_bars(parts)
    axes.errorbar(range(len(parts)), accuracy, yerr=bars, linestyle="none", capsize=3, **DOTS)
    axes.axhline(0.5, linestyle=":", **LEVEL)
    labels = [f"to {part['high']:,}\n({part['pairs']:,})" for part in parts]
    axes.set_xticks(range(len(parts)), labels, fontsize=8.5)
    axes.set_xlim(-0.6, len(parts) - 0.4)
    axes.yaxis.set_major_formatter(AS_PERCENT)
    style_axes(axes, "(d) Accuracy by dialogue length", "tokens of the longer side (pairs)", "accuracy")
