"""How far pairwise scores can be trusted: intervals that heed shared prompts, calibration, two models compared.

A margin is the score of a pair's chosen side minus that of its rejected side.
"""

from typing import Any

import numpy as np
from scipy import optimize, stats
from scipy.special import expit

DRAWS = 2000
BINS = 15
_CELLS_AT_ONCE = 2_000_000  # of draws times prompts, so that memory does not grow with the data
_TEMPERATURES = (-20.0, 20.0)  # logarithms of the search's ends, in units of the mean absolute margin


def credit(margin: np.ndarray) -> np.ndarray:
    """What each of the (n,) margins counts: 1 if positive, a half for a tie, else 0."""
    return (margin > 0) + 0.5 * (margin == 0)


def pairwise_accuracy(margin: np.ndarray) -> float:
    """Share of the (n,) margins that are positive; a tie counts half."""
    return float(np.mean(credit(margin)))


def bootstrap_interval(
    values: np.ndarray, prompts: np.ndarray, weights: np.ndarray | None = None
) -> list[float] | None:
    """95% percentile bootstrap interval of the (weighted) mean of `values`, by 2,000 draws of whole prompts.

    Pairs on one prompt tend to be right or wrong together, so a draw takes all pairs of a prompt or none (Davison and
    Hinkley, 1997, Bootstrap Methods and their Application, section 3.8). The seed is fixed.

    Args:
        values: (n,) one a pair.
        prompts: (n,) which pairs share a prompt.
        weights: (n,) of the pairs; equal by default.

    Returns:
        The lower and the upper end, or None for pairs on fewer than two prompts.
    """
    weights = np.ones(len(values)) if weights is None else weights
    names, group = np.unique(prompts, return_inverse=True)
    if len(names) < 2:
        return None
    interval = stats.bootstrap(
        (np.bincount(group, weights * values), np.bincount(group, weights)),
        lambda totals, sizes, axis: totals.sum(axis) / sizes.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=DRAWS,
        batch=max(1, _CELLS_AT_ONCE // len(names)),
        rng=0,
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


def accuracy_figures(margin: np.ndarray, prompts: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Any]:
    """`pairs`, `accuracy` (a tie counts half) and its `accuracy_ci95` of (n,) margins, n > 0, weighted if asked."""
    return {
        "pairs": len(margin),
        "accuracy": float(np.average(credit(margin), weights=weights)),
        "accuracy_ci95": bootstrap_interval(credit(margin), prompts, weights),
    }


def reliability_bins(margin: np.ndarray) -> list[dict[str, Any]]:
    """The reliability diagram: how often the model is right beside how sure it is.

    A pair's confidence is sigmoid(|m|), what Bradley and Terry's model gives the side that it prefers. The bins are 15
    of equal width on [0.5, 1], the last one closed. Each gives its ends `low` and `high`, its `pairs`, their mean
    `confidence` and their `accuracy` (None for an empty bin).
    """
    confidence = expit(np.abs(margin))
    pairs, edges, _ = stats.binned_statistic(confidence, None, "count", BINS, range=(0.5, 1.0))
    means, _, _ = stats.binned_statistic(confidence, [confidence, credit(margin)], "mean", BINS, range=(0.5, 1.0))
    return [
        {
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "pairs": int(pairs[i]),
            "confidence": float(means[0, i]) if pairs[i] else None,
            "accuracy": float(means[1, i]) if pairs[i] else None,
        }
        for i in range(BINS)
    ]


def expected_calibration_error(bins: list[dict[str, Any]]) -> float:
    """Mean distance of accuracy and confidence over the bins, weighted by their pairs.

    Source: Guo et al. (2017), On Calibration of Modern Neural Networks, equation 3.
    """
    filled = [part for part in bins if part["pairs"]]
    gaps = [abs(part["accuracy"] - part["confidence"]) for part in filled]
    return float(np.average(gaps, weights=[part["pairs"] for part in filled]))


def bradley_terry_loss(margin: np.ndarray) -> float:
    """Mean of -log sigmoid(m) of the (n,) margins, in nats."""
    return float(np.mean(np.logaddexp(0.0, -margin)))


def brier_score(margin: np.ndarray) -> float:
    """Mean of (1 - sigmoid(m))^2: the squared error of the probability given to the chosen side."""
    return float(np.mean(expit(-margin) ** 2))


def best_temperature(margin: np.ndarray) -> float | None:
    """The T > 0 that minimises the loss of m / T: over 1 for a model too sure of itself, under 1 for one too timid.

    Source: Guo et al. (2017), section 4.2. None where no finite T > 0 is best: for a model that is never wrong T goes
    to 0, for one whose mean margin is not positive T goes to infinity.
    """
    if margin.mean() <= 0 or margin.min() >= 0:
        return None
    unit = np.abs(margin).mean()
    found = optimize.minimize_scalar(
        lambda log: bradley_terry_loss(margin / unit * np.exp(-log)), bounds=_TEMPERATURES, method="bounded"
    )
    return float(unit * np.exp(found.x))


def paired_test(margin: np.ndarray, baseline: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Whether a model ranks the same pairs better than another one.

    Takes the (n,) margins of the model and of the other one, and (n,) numbers that tell which pairs share a prompt.

    Returns:
        `pairs`; both accuracies; `accuracy_difference` with its bootstrap interval by prompt; how many pairs the model
        ranks `better` and `worse` than the other; `mcnemar_p`, the exact two-sided p-value of McNemar's test (McNemar,
        1947, Psychometrika 12(2)) that both are equally often the better one, which takes pairs as independent.
    """
    difference = credit(margin) - credit(baseline)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return {
        "pairs": len(margin),
        "accuracy": pairwise_accuracy(margin),
        "baseline_accuracy": pairwise_accuracy(baseline),
        "accuracy_difference": float(difference.mean()),
        "accuracy_difference_ci95": bootstrap_interval(difference, prompts),
        "better": better,
        "worse": worse,
        "mcnemar_p": float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0,
    }
