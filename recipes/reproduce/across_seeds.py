"""What several runs show together: means over seeds, learning curves, agreement, compute."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A figure and the ends of its 95% interval by Student's t, where it has one."""

    value: float
    interval: tuple[float, float] | None


def _estimate(value: float, standard_error: float, freedom: int) -> Estimate:
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * standard_error
    return Estimate(float(value), (float(value - reach), float(value + reach)))


def mean_over_runs(values: pd.Series) -> Estimate:
    """The mean of one figure a run, n > 0; fewer than three give no interval: that of two is 12.7 errors long."""
    mean = values.mean()
    # scipy's `ttest_1samp` has this interval too, but warns when all runs have the same figure.
    return _estimate(mean, values.sem(), len(values) - 1) if len(values) > 2 else Estimate(mean, None)


def learning_curve(pairs: np.ndarray, accuracy: np.ndarray, at: float) -> tuple[Estimate, Estimate]:
    """What a doubling of the training pairs gains, and the accuracy to expect `at` a number of them.

    Both are of a line a + b log2(pairs), fitted by least squares to (n,) pairs and accuracies of runs, n > 2. Their
    intervals are about other runs on the same test pairs, whose own luck moves all runs up or down together; they take
    runs as independent, and that the line goes on to `at`.
    """
    # Counted in doublings of `at`, the intercept is the accuracy there.
    fit, freedom = stats.linregress(np.log2(pairs / at), accuracy), len(pairs) - 2
    return _estimate(fit.slope, fit.stderr, freedom), _estimate(fit.intercept, fit.intercept_stderr, freedom)


def agreement(margins: np.ndarray) -> float:
    """Share of pairs on which two runs prefer the same side, over all twos of (n, runs) margins; a tie is half."""
    signs = np.sign(margins)
    first, second = np.triu_indices(signs.shape[1], k=1)
    return float(np.mean((1 + signs[:, first] * signs[:, second]) / 2))


def compute(cost: Mapping[str, Any]) -> float:
    """FLOPs of training from a summary's `cost`: 6 for each weight and token computed.

    Attention between tokens and the embeddings are left out, as in the source (Kaplan et al., 2020, Scaling Laws for
    Neural Language Models, section 2.1).
    """
    return 6.0 * cost["weights"] * cost["num_unique_tokens" if cost["packed"] else "num_padded_tokens"]
