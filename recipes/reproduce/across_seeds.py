"""What several runs show together: means over seeds, differences, agreement, ensembles, learning curves."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
CEILINGS = np.linspace(0.5, 1, 501)
EXPONENTS = np.linspace(0, 5, 2001)


@dataclass(frozen=True)
class Mean:
    """A mean over runs: the standard deviation between them, None for one run, and the 95% interval by Student's t.

    The interval is None for fewer than three runs: from two it would be 12.7 standard errors long to either side.
    """

    mean: float
    interval: tuple[float, float] | None
    deviation: float | None


def mean_over_runs(values: Iterable[float]) -> Mean:
    """The mean of one figure a run, n > 0."""
    values = np.array([*values], dtype=float)
    mean = float(values.mean())
    if len(values) == 1:
        return Mean(mean, None, None)
    deviation = float(values.std(ddof=1))
    if len(values) == 2:
        return Mean(mean, None, deviation)
    reach = _quantile(len(values) - 1) * deviation / np.sqrt(len(values))
    return Mean(mean, (float(mean - reach), float(mean + reach)), deviation)


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Mean | None:
    """Mean difference of two arms over the seeds that both have, since a seed stands for the same pairs in both."""
    seeds = sorted(arm.keys() & baseline.keys())
    return mean_over_runs(arm[seed] - baseline[seed] for seed in seeds) if seeds else None


def _quantile(freedom: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def agreement(margins: np.ndarray) -> float:
    """Share of pairs on which two runs prefer the same side, over all twos of (runs, n) margins; a tie is half."""
    signs = np.sign(margins)
    first, second = np.triu_indices(len(signs), k=1)
    return float(np.mean((1 + signs[first] * signs[second]) / 2))


def ensemble(margins: np.ndarray) -> np.ndarray:
    """(n,) margins of several runs together: the mean of (runs, n) margins, each run's divided by its own scale.

    Rewards have no common scale, so that a run with larger margins would otherwise outvote the others. The scale is the
    root mean square; a run whose margins are all 0 has no vote.
    """
    scale = np.sqrt(np.mean(np.square(margins), axis=1, keepdims=True))
    return (margins / np.where(scale > 0, scale, 1)).mean(axis=0)


@dataclass(frozen=True)
class LearningCurve:
    """Accuracy a + b log2(pairs), fitted by least squares to one accuracy a run; intervals are 95%, by Student's t.

    They are about other runs on the same test pairs, whose own luck moves all runs up or down together, and take runs
    as independent. `per_doubling` is b with its interval. `ceilings` are the lowest and highest limit c for which
    accuracy c - d pairs^-e (d >= 0; a power law that levels off: Hestness et al., 2017, Deep Learning Scaling is
    Predictable, Empirically) fits no worse than with its best c, by an F test at the 5% level (Bates and Watts, 1988,
    Nonlinear Regression Analysis, section 6.1): what these runs cannot tell apart. Accuracies that do not rise allow
    every limit from about their mean on, since a power law may have levelled off before them or not begun. None with
    too few runs or sizes for three parameters.
    """

    per_doubling: tuple[float, float, float]
    ceilings: tuple[float, float] | None
    _doublings: np.ndarray
    _accuracy: np.ndarray

    def at(self, pairs: float) -> tuple[float, float, float]:
        """Expected accuracy at a number of pairs, and its interval, which takes it that the line goes on to there."""
        x, y, slope = self._doublings, self._accuracy, self.per_doubling[0]
        away, offsets = np.log2(pairs) - x.mean(), x - x.mean()
        spread = np.sqrt(np.sum((y - y.mean() - slope * offsets) ** 2) / (len(x) - 2))
        reach = _quantile(len(x) - 2) * spread * np.sqrt(1 / len(x) + away**2 / np.sum(offsets**2))
        mean = y.mean() + slope * away
        return float(mean), float(mean - reach), float(mean + reach)


def fit_learning_curve(pairs: Sequence[int], accuracy: Sequence[float]) -> LearningCurve:
    """Fit (n,) accuracies of runs on (n,) numbers of pairs, at least three runs and two numbers."""
    sizes, y = np.asarray(pairs, dtype=float), np.asarray(accuracy, dtype=float)
    fit = stats.linregress(np.log2(sizes), y)
    reach = _quantile(len(y) - 2) * fit.stderr
    doubling = (float(fit.slope), float(fit.slope - reach), float(fit.slope + reach))
    return LearningCurve(doubling, _ceilings(sizes, y), np.log2(sizes), y)


def _ceilings(sizes: np.ndarray, accuracy: np.ndarray) -> tuple[float, float] | None:
    if len(accuracy) < 4 or len(np.unique(sizes)) < 3:
        return None
    below = CEILINGS[:, None] - accuracy
    shapes = (sizes / sizes.min()) ** -EXPONENTS[:, None]
    # For each c and e the best d has a closed form, that of a regression through the origin.
    explained = np.maximum(below @ shapes.T, 0) ** 2 / np.sum(shapes**2, axis=1)
    squares = np.sum(below**2, axis=1) - explained.max(axis=1)
    freedom = len(accuracy) - 3
    allowed = squares.min() * (1 + stats.f.ppf(CONFIDENCE, 1, freedom) / freedom)
    kept = CEILINGS[squares <= allowed + 1e-12]
    return float(kept.min()), float(kept.max())


def compute(cost: Mapping[str, Any]) -> float:
    """FLOPs of training: 6 for each weight and token computed (Kaplan et al., 2020, section 2.1).

    Attention between tokens and the embeddings are left out, as there.

    Args:
        cost: of `provenance.cost`.
    """
    return 6.0 * cost["weights"] * cost["num_unique_tokens" if cost["packed"] else "num_padded_tokens"]
