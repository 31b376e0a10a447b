"""The pictures of RESULTS.md, as PNG files: arms against the first one, and accuracy against the number of pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from across_seeds import Estimate, learning_curve
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe-Ito, as in a run's picture.
BLUE, RED = "#0072B2", "#D55E00"


def draw_comparison(changes: Mapping[str, Sequence[Estimate]], first: str, path: Path) -> None:
    """Draw what each arm gained in accuracy (a share) and its change of test loss, with intervals over seeds.

    The two are by the arm's title, in the order to show; `first` is that of the arm that they are compared with.
    """
    figure = Figure(figsize=(10, 1.5 + 0.32 * len(changes)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    gained, lost = zip(*changes.values(), strict=True)
    for axes, found, unit, colour in ((left, gained, 100, BLUE), (right, lost, 1, RED)):
        middle = unit * np.array([change.value for change in found])
        ends = unit * np.array([change.interval for change in found])
        axes.errorbar(middle, range(len(found)), xerr=np.abs(ends.T - middle), fmt="o", color=colour, capsize=3)
        axes.axvline(0, color="0.3", linewidth=1.1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(changes)), [title.replace("`", "") for title in changes])
    left.set_ylim(len(changes) - 0.5, -0.5)
    left.set_xlabel("accuracy, points (right: better)")
    right.set_xlabel("loss (left: better)")
    figure.suptitle(f"On the test split, against: {first.replace('`', '')}", fontsize=9.5)
    figure.savefig(path, metadata={"Software": None})


def draw_learning_curve(runs: pd.DataFrame, longer: float, until: int, path: Path) -> None:
    """Draw accuracy against training pairs, one dot a run, and the fitted line to `until` pairs.

    `longer` is the accuracy of always preferring the text of more tokens.
    """
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    pairs, accuracy = runs["pairs"], runs["test_accuracy"]
    along = np.geomspace(pairs.min(), until, 60)
    line = [learning_curve(pairs, accuracy, at)[1] for at in along]
    ends = np.array([each.interval for each in line]).T
    axes.fill_between(along, *ends, color=BLUE, alpha=0.15, linewidth=0, label="its 95% interval")
    axes.plot(along, [each.value for each in line], color=BLUE, label="line in log(pairs), fitted")
    axes.plot(pairs, accuracy, "o", color=RED, label="one run")
    axes.axhline(longer, color="0.3", linestyle="--", linewidth=1.1, label="always the text of more tokens")
    axes.axvspan(pairs.max(), until, color="0.95", zorder=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.set_xlabel("training pairs (grey: beyond the runs)")
    axes.set_ylabel("test accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(edgecolor="none", fontsize=8.5, loc="upper left")
    figure.savefig(path, metadata={"Software": None})
