"""How far pairwise scores can be trusted: intervals that heed shared prompts, calibration, two models compared.

Scores (n, 2) hold those of n pairs, chosen first; a margin m is their difference. `prompts` number the first turns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy  # whose parts are imported when they are used: `stats` takes a second

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
    """95% percentile bootstrap interval of the (weighted) mean of n `values`, by 2,000 draws of whole `prompts`.

    Pairs on one prompt tend to be right or wrong together, so a draw takes all pairs of a prompt or none (Davison and
    Hinkley, 1997, Bootstrap Methods and their Application, section 3.8). The seed is fixed. None for fewer than two
    prompts.
    """
    weights = np.ones(len(values)) if weights is None else weights
    names, group = np.unique(prompts, return_inverse=True)
    if len(names) < 2:
        return None
    interval = scipy.stats.bootstrap(
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


def reliability_bins(margin: np.ndarray) -> list[dict[str, Any]]:
    """The reliability diagram: how often the model is right beside how sure it is, in 15 bins of equal width.

    A pair's confidence is sigmoid(|m|), what Bradley and Terry's model gives the side that it prefers. Each bin gives
    its ends `low` and `high`, its `pairs`, their mean `confidence` and their `accuracy` (None for an empty bin).
    """
    confidence = scipy.special.expit(np.abs(margin))
    pairs, edges, _ = scipy.stats.binned_statistic(confidence, None, "count", BINS, range=(0.5, 1.0))
    means, _, _ = scipy.stats.binned_statistic(confidence, [confidence, credit(margin)], "mean", BINS, range=(0.5, 1.0))
    bins = {"low": edges[:-1], "high": edges[1:], "pairs": pairs.astype(int), "confidence": means[0]}
    table = pd.DataFrame(bins | {"accuracy": means[1]}).astype(object)
    return table.where(table.notna(), None).to_dict("records")


def expected_calibration_error(bins: list[dict[str, Any]]) -> float:
    """Mean distance of accuracy and confidence over the bins, weighted by pairs (Guo et al., 2017, equation 3)."""
    filled = [part for part in bins if part["pairs"]]
    gaps = [abs(part["accuracy"] - part["confidence"]) for part in filled]
    return float(np.average(gaps, weights=[part["pairs"] for part in filled]))


def bradley_terry_loss(margin: np.ndarray) -> float:
    """Mean of -log sigmoid(m) of the (n,) margins, in nats."""
    return float(np.mean(np.logaddexp(0.0, -margin)))


def best_temperature(margin: np.ndarray) -> float | None:
    """The T > 0 that minimises the loss of m / T (Guo et al., 2017, On Calibration of Modern Neural Networks, 4.2).

    None where no finite T > 0 is best: for a model that is never wrong T goes to 0, for one whose mean margin is not
    positive T goes to infinity.
    """
    if margin.mean() <= 0 or margin.min() >= 0:
        return None
    unit = np.abs(margin).mean()
    found = scipy.optimize.minimize_scalar(
        lambda log: bradley_terry_loss(margin / unit * np.exp(-log)), bounds=_TEMPERATURES, method="bounded"
    )
    return float(unit * np.exp(found.x))


def reliability_metrics(scores: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """How far the figures of `metrics.PreferenceMetrics` can be trusted, from (n, 2) scores and (n,) prompts.

    Returns:
        `prompts`: how many there are; `accuracy_ci95`: see `bootstrap_interval`; `brier`: mean of (1 - sigmoid(m))^2;
        `ece`: expected calibration error over `reliability_bins`; `temperature`: see `best_temperature`.
    """
    margin = scores[:, 0].astype(np.float64) - scores[:, 1]
    return {
        "prompts": len(np.unique(prompts)),
        "accuracy_ci95": bootstrap_interval(credit(margin), prompts),
        "brier": float(np.mean(scipy.special.expit(-margin) ** 2)),
        "ece": expected_calibration_error(reliability_bins(margin)),
        "temperature": best_temperature(margin),
    }


def paired_test(model: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, Any]:
    """Whether a model ranks the same pairs better than another one, from both tables of `test_split.score_table`.

    `mcnemar_p` is the exact two-sided p-value of McNemar's test (1947, Psychometrika 12(2)) that the model is equally
    often `better` and `worse`, which takes pairs as independent. `only_model` counts pairs that it alone could score.
    """
    both = model.merge(baseline, on="row", suffixes=("", "_baseline"))
    ours = credit(both.chosen_score.to_numpy() - both.rejected_score.to_numpy())
    theirs = credit(both.chosen_score_baseline.to_numpy() - both.rejected_score_baseline.to_numpy())
    difference = ours - theirs
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return {
        "pairs": len(both),
        "accuracy": float(ours.mean()),
        "baseline_accuracy": float(theirs.mean()),
        "accuracy_difference": float(difference.mean()),
        "accuracy_difference_ci95": bootstrap_interval(difference, both.prompt_id.to_numpy()),
        "better": better,
        "worse": worse,
        "mcnemar_p": float(scipy.stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0,
        "only_model": len(model) - len(both),
        "only_baseline": len(baseline) - len(both),
    }


def compute_preference_metrics(
    scores: np.ndarray, subsets: np.ndarray | None = None, names: Sequence[str] = ()
) -> dict[str, float]:
    """`PreferenceMetrics`, and `accuracy_NAME` of each subset that has pairs; `subsets` (n,) number the `names`."""
    from reward_recipes.evaluate.metrics import PreferenceMetrics  # and with it `evaluate`, when first asked for

    metrics = PreferenceMetrics().compute(chosen=scores[:, 0], rejected=scores[:, 1])
    for index, name in enumerate(names):
        part = scores[subsets == index]
        if len(part):
            metrics[f"accuracy_{name}"] = pairwise_accuracy(part[:, 0] - part[:, 1])
    return metrics
