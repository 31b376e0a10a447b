"""The pictures of RESULTS.md, as PNG files: arms against the first one, and accuracy against the number of pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from collected import Estimate, learning_curve
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reward_recipes.evaluate import LONGER
from reward_recipes.evaluate.picture import AS_PERCENT, LEVEL, STYLE

BLUE, RED = "#0072B2", "#D55E00"  # Okabe-Ito, as in a run's picture


def draw_comparison(changes: Mapping[str, Sequence[Estimate]], first: str, path: Path) -> None:
    """Draw what each arm gained in accuracy (a share) and its change of test loss, with intervals over seeds.

    The two are by the arm's title, in the order to show; `first` is that of the arm that they are compared with.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.6 + 0.34 * len(changes)), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        gained, lost = zip(*changes.values(), strict=True)
        for axes, found, unit, colour in ((left, gained, 100, BLUE), (right, lost, 1, RED)):
            middle = unit * np.array([change.value for change in found])
            ends = unit * np.array([change.interval for change in found])
            axes.errorbar(middle, range(len(found)), xerr=np.abs(ends.T - middle), fmt="o", color=colour, capsize=3)
            axes.axvline(0, **LEVEL)
            axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.tick_params(axis="y", length=0)
        left.set_yticks(range(len(changes)), [title.replace("`", "") for title in changes])
        left.set_ylim(len(changes) - 0.5, -0.5)
        left.set(title="(a) Test accuracy: right is better", xlabel="points gained, 95% interval over seeds")
        right.set(title="(b) Test loss: left is better", xlabel="change of loss (nats), 95% interval over seeds")
        figure.suptitle(f"Against: {first.replace('`', '')}", fontsize=9.5)
        figure.savefig(path, metadata={"Software": None})


def draw_learning_curve(runs: pd.DataFrame, longer: float, until: int, path: Path) -> None:
    """Draw accuracy against training pairs, one dot a run, and the fitted line to `until` pairs.

    `longer` is the accuracy of always preferring the longer text.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
        axes = figure.subplots()
        pairs, accuracy = runs["pairs"], runs["test_accuracy"]
        along = np.geomspace(pairs.min(), until, 60)
        line = [learning_curve(pairs, accuracy, at)[1] for at in along]
        ends = np.array([each.interval for each in line]).T
        axes.fill_between(along, *ends, color=BLUE, alpha=0.15, linewidth=0, label="its 95% interval")
        axes.plot(along, [each.value for each in line], color=BLUE, label="line in log(pairs), fitted")
        axes.plot(pairs, accuracy, "o", color=RED, label="one run")
        axes.axhline(longer, linestyle="--", label=LONGER, **LEVEL)
        axes.axvspan(pairs.max(), until, color="0.95", zorder=0, label="beyond the runs")
        axes.set_xscale("log", base=2)
        axes.set_xticks([*sorted(set(pairs)), 10_000, 40_000, until])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(AS_PERCENT)
        axes.set(title="Test accuracy by training pairs", xlabel="training pairs (log scale)", ylabel="test accuracy")
        axes.legend(loc="upper left", framealpha=0)
        figure.savefig(path, metadata={"Software": None})
