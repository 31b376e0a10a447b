"""What several runs show together: means over seeds, differences, agreement, ensembles, learning curves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


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
    mean, runs = float(values.mean()), len(values)
    deviation = float(values.std(ddof=1)) if runs > 1 else None
    # scipy's `ttest_1samp` has this interval too, but warns when all runs have the same figure.
    interval = _with_interval(mean, stats.sem(values), runs - 1)[1:] if runs > 2 else None
    return Mean(mean, interval, deviation)


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Mean | None:
    """Mean difference of two arms over the seeds that both have, since a seed stands for the same pairs in both."""
    seeds = sorted(arm.keys() & baseline.keys())
    return mean_over_runs(arm[seed] - baseline[seed] for seed in seeds) if seeds else None


def _with_interval(estimate: float, standard_error: float, freedom: int) -> tuple[float, float, float]:
    """An estimate and the ends of its interval by Student's t."""
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * standard_error
    return float(estimate), float(estimate - reach), float(estimate + reach)


def agreement(margins: np.ndarray) -> float:
    """Share of pairs on which two runs prefer the same side, over all twos of (runs, n) margins; a tie is half."""
    signs = np.sign(margins)
    first, second = np.triu_indices(len(signs), k=1)
    return float(np.mean((1 + signs[first] * signs[second]) / 2))


def ensemble(margins: np.ndarray) -> np.ndarray:
    """(n,) margins of several runs together: the mean of (runs, n) margins, each run's divided by its own scale.

    Rewards have no common scale, so a run with larger margins would otherwise outvote the others. The scale is the root
    mean square; a run whose margins are all 0 has no vote.
    """
    scale = np.sqrt(np.mean(np.square(margins), axis=1, keepdims=True))
    return (margins / np.where(scale > 0, scale, 1)).mean(axis=0)


@dataclass(frozen=True)
class LearningCurve:
    """Accuracy a + b log2(pairs), fitted by least squares to (n,) pairs and accuracies of runs.

    It needs three runs and two numbers of pairs at least. Intervals are 95%, by Student's t. They are about other runs
    on the same test pairs, whose own luck moves all runs up or down together, and take runs as independent.
    """

    pairs: np.ndarray
    accuracy: np.ndarray

    @property
    def per_doubling(self) -> tuple[float, float, float]:
        """What a doubling of the pairs gains, and its interval."""
        fit = stats.linregress(np.log2(self.pairs), self.accuracy)
        return _with_interval(fit.slope, fit.stderr, len(self.pairs) - 2)

    def at(self, pairs: float) -> tuple[float, float, float]:
        """Expected accuracy at a number of pairs, and its interval, which takes it that the line goes on to there."""
        # Counted in doublings of `pairs`, the intercept is the accuracy at `pairs`.
        fit = stats.linregress(np.log2(self.pairs / pairs), self.accuracy)
        return _with_interval(fit.intercept, fit.intercept_stderr, len(self.pairs) - 2)


def compute(cost: Mapping[str, Any]) -> float:
    """FLOPs of training from a summary's `cost`: 6 for each weight and token computed.

    Attention between tokens and the embeddings are left out, as in the source (Kaplan et al., 2020, Scaling Laws for
    Neural Language Models, section 2.1).
    """
    return 6.0 * cost["weights"] * cost["num_unique_tokens" if cost["packed"] else "num_padded_tokens"]
