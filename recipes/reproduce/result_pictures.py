"""The pictures of RESULTS.md: arms against the first one, and accuracy against the number of pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from across_seeds import LearningCurve, Mean
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reward_recipes.run import replacing

# Okabe-Ito, as in a run's picture.
BLUE, RED = "#0072B2", "#D55E00"


def draw_comparison(changes: Mapping[str, tuple[Mean, Mean]], first: str, path: Path) -> None:
    """Draw what each arm gained in accuracy (as shares) and in test loss, with intervals over seeds.

    Args:
        changes: by title, in the order to show.
        first: title of the arm that they are compared with.
        path: where the PNG goes.
    """
    figure = Figure(figsize=(10, 1.5 + 0.32 * len(changes)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    gained, lost = zip(*changes.values(), strict=True)
    _intervals(left, gained, 100, BLUE)
    _intervals(right, lost, 1, RED)
    left.set_yticks(range(len(changes)), [title.replace("`", "") for title in changes])
    left.set_ylim(len(changes) - 0.5, -0.5)
    left.set_xlabel("accuracy, points (right: better)")
    right.set_xlabel("loss (left: better)")
    figure.suptitle(f"On the test split, against: {first.replace('`', '')}", fontsize=9.5)
    _save(figure, path)


def _intervals(axes: Axes, means: Sequence[Mean], unit: float, colour: str) -> None:
    middle = unit * np.array([mean.mean for mean in means])
    ends = unit * np.array([mean.interval for mean in means])
    reach = np.abs(ends.T - middle)
    axes.errorbar(middle, range(len(means)), xerr=reach, fmt="o", color=colour, capsize=3)
    axes.axvline(0, color="0.3", linewidth=1.1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.spines[["top", "right"]].set_visible(False)


def draw_learning_curve(
    curve: LearningCurve, tested: Sequence[tuple[int, float]], longer: Sequence[float], until: int, path: Path
) -> None:
    """Draw accuracy against training pairs: one dot a run, the fitted line, and where it leads.

    Args:
        curve: the line.
        tested: pairs and test accuracy (a share) of each run.
        longer: accuracy of always preferring the text of more tokens, or nothing.
        until: pairs to draw the line to.
        path: where the PNG goes.
    """
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    pairs, accuracy = zip(*tested, strict=True)
    along = np.geomspace(min(pairs), until, 60)
    mean, low, high = np.array([curve.at(size) for size in along]).T
    axes.fill_between(along, low, high, color=BLUE, alpha=0.15, linewidth=0, label="its 95% interval")
    axes.plot(along, mean, color=BLUE, label="line in log(pairs), fitted")
    axes.plot(pairs, accuracy, "o", color=RED, label="one run")
    for level in longer:
        axes.axhline(level, color="0.3", linestyle="--", linewidth=1.1, label="always the text of more tokens")
    axes.axvspan(max(pairs), until, color="0.95", zorder=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.set_xlabel("training pairs (grey: beyond the runs)")
    axes.set_ylabel("test accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(edgecolor="none", fontsize=8.5, loc="upper left")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
