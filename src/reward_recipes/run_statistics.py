"""What several runs show together: means over seeds, differences, agreement, ensembles, learning curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from reward_recipes.uncertainty import credit

CONFIDENCE = 0.95
CEILINGS = np.linspace(0.5, 1, 501)


@dataclass(frozen=True)
class Mean:
    """A mean over runs: its 95% interval by Student's t, and the standard deviation between runs; None for one run."""

    mean: float
    low: float | None
    high: float | None
    deviation: float | None
    runs: int


def mean_over_runs(values: Sequence[float]) -> Mean:
    """The mean of one figure a run, n > 0."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return Mean(float(values.mean()), None, None, None, len(values))
    deviation = float(values.std(ddof=1))
    reach = _quantile(len(values) - 1) * deviation / np.sqrt(len(values))
    return Mean(
        float(values.mean()), float(values.mean() - reach), float(values.mean() + reach), deviation, len(values)
    )


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Mean | None:
    """Mean difference of two arms over the seeds that both have, since a seed stands for the same pairs in both."""
    seeds = sorted(arm.keys() & baseline.keys())
    return mean_over_runs([arm[seed] - baseline[seed] for seed in seeds]) if seeds else None


def _quantile(freedom: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def agreement(margins: np.ndarray) -> float:
    """Share of pairs on which two runs prefer the same side, over all twos of (runs, n) margins; a tie is half."""
    signs = np.sign(margins)
    first, second = np.triu_indices(len(signs), k=1)
    return float(np.mean((1 + signs[first] * signs[second]) / 2))


def ensemble(margins: np.ndarray) -> np.ndarray:
    """(n,) margins of several runs together: the mean of (runs, n) margins, each run's divided by its spread.

    Rewards have no common scale, so that a run with larger margins would otherwise outvote the others.
    """
    return (margins / margins.std(axis=1, keepdims=True)).mean(axis=0)


def length_only(chosen_length: np.ndarray, rejected_length: np.ndarray) -> float:
    """Accuracy of always preferring the longer of (n,) replies; a tie counts half."""
    return float(credit(np.asarray(chosen_length) - np.asarray(rejected_length)).mean())


@dataclass(frozen=True)
class LearningCurve:
    """Accuracy a + b log2(pairs), fitted by least squares to one accuracy a run; intervals are 95%, by Student's t.

    `per_doubling` is b with its interval. `ceilings` are those limits c for which accuracy c - d pairs^-e, a power law
    that levels off, fits no worse than its best c at the 5% level, by an F test: the reach of what the runs cannot tell
    apart. (Power law: Hestness et al., 2017, Deep Learning Scaling is Predictable, Empirically.)
    """

    intercept: float
    per_doubling: tuple[float, float, float]
    ceilings: tuple[float, float] | None
    _pairs: np.ndarray
    _spread: float

    def at(self, pairs: float) -> tuple[float, float, float]:
        """Expected accuracy at a number of pairs, and its interval, which takes it that the law holds there."""
        x, at = np.log2(self._pairs), np.log2(pairs)
        n, squares = len(x), np.sum((x - x.mean()) ** 2)
        reach = _quantile(n - 2) * self._spread * np.sqrt(1 / n + (at - x.mean()) ** 2 / squares)
        mean = self.intercept + self.per_doubling[0] * at
        return float(mean), float(mean - reach), float(mean + reach)


def fit_learning_curve(pairs: Sequence[int], accuracy: Sequence[float]) -> LearningCurve:
    """Fit (n,) accuracies of runs on (n,) numbers of pairs, at least three runs and two numbers."""
    sizes, y = np.asarray(pairs, dtype=float), np.asarray(accuracy, dtype=float)
    x = np.log2(sizes)
    fit = stats.linregress(x, y)
    reach = _quantile(len(x) - 2) * fit.stderr
    spread = np.sqrt(np.sum((y - fit.intercept - fit.slope * x) ** 2) / (len(x) - 2))
    doubling = (float(fit.slope), float(fit.slope - reach), float(fit.slope + reach))
    return LearningCurve(float(fit.intercept), doubling, _ceilings(sizes, y), sizes, float(spread))


def _ceilings(sizes: np.ndarray, accuracy: np.ndarray) -> tuple[float, float] | None:
    """The lowest and highest limit of a power law that the accuracies allow; None with too few runs for one."""
    if len(accuracy) < 4 or len(np.unique(sizes)) < 3:
        return None
    relative = sizes / sizes.min()

    def residual(ceiling: float) -> float:
        found = optimize.minimize_scalar(
            lambda e: _misfit(ceiling, e, relative, accuracy), bounds=(0, 5), method="bounded"
        )
        return float(found.fun)

    squares = np.array([residual(ceiling) for ceiling in CEILINGS])
    freedom = len(accuracy) - 3
    allowed = squares.min() * (1 + stats.f.ppf(CONFIDENCE, 1, freedom) / freedom)
    kept = CEILINGS[squares <= allowed + 1e-12]
    return float(kept.min()), float(kept.max())


def _misfit(ceiling: float, exponent: float, relative: np.ndarray, accuracy: np.ndarray) -> float:
    """Squared error of c - d pairs^-e at the best d that is not negative, which has a closed form."""
    shape = relative**-exponent
    d = max(float(np.sum((ceiling - accuracy) * shape) / np.sum(shape**2)), 0)
    return float(np.sum((accuracy - ceiling + d * shape) ** 2))


def compute(cost: Mapping[str, Any]) -> float:
    """FLOPs of training: 6 for each weight and token computed (Kaplan et al., 2020, section 2.1).

    Attention between tokens and the embeddings are left out, as there.

    Args:
        cost: of `provenance.cost`.
    """
    return 6.0 * cost["weights"] * cost["num_unique_tokens" if cost["packed"] else "num_padded_tokens"]
