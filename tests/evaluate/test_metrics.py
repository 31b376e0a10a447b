"""Metrics of Hugging Face's `evaluate`, intervals by prompt and calibration: by hand, or by drawing one by one."""

import math

import evaluate
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from reward_recipes.evaluate import bootstrap_interval, compute_preference_metrics, credit
from reward_recipes.evaluate.metrics import PreferenceMetrics
from reward_recipes.evaluate.uncertainty import (
    best_temperature,
    expected_calibration_error,
    paired_test,
    reliability_bins,
    reliability_metrics,
)

# Margins 2, -1, 0, 0.5: two right, one wrong, one tie.
SCORES = np.array([[3.0, 1.0], [0.0, 1.0], [2.0, 2.0], [0.5, 0.0]])
MARGINS = (2.0, -1.0, 0.0, 0.5)


def test_preference_metrics_by_hand() -> None:
    """Accuracy (1 + 0 + 1/2 + 1) / 4; loss the mean of ln(1 + e^-m); eight scores sum to 9.5."""
    figures, squares = compute_preference_metrics(SCORES), 3**2 + 1 + 0 + 1 + 2**2 + 2**2 + 0.5**2 + 0
    assert figures == {
        "accuracy": 0.625,
        "ties": 0.25,
        "loss": pytest.approx(sum(math.log(1 + math.exp(-margin)) for margin in MARGINS) / 4, rel=1e-12),
        "margin": 0.375,
        "mean_reward": pytest.approx(9.5 / 8),
        "std_reward": pytest.approx(math.sqrt(squares / 8 - (9.5 / 8) ** 2)),
        "pairs": 4,
    }
    swapped = compute_preference_metrics(SCORES[:, ::-1])
    assert (swapped["accuracy"], swapped["margin"], swapped["ties"]) == (0.375, -0.375, 0.25)
    assert swapped["loss"] == pytest.approx(figures["loss"] + figures["margin"])  # -log s(-m) = m - log s(m)
    assert compute_preference_metrics(np.array([[0.0, 2000.0], [2000.0, 0.0]]))["loss"] == 1000.0
    assert credit(np.array([2.0, 0.0, -0.0, -3.0])).tolist() == [1.0, 0.5, 0.5, 0.0]


def test_subsets_and_a_collapsed_model() -> None:
    """Pairs 0, 1 and 3 are helpful (right, wrong, right), pair 2 is harmless (a tie); nothing is left out or empty."""
    figures = compute_preference_metrics(SCORES, np.array([1, 1, 0, 1]), ["harmless", "helpful", "absent"])
    assert (figures["accuracy_harmless"], figures["accuracy"]) == (0.5, 0.625)
    assert figures["accuracy_helpful"] == pytest.approx(2 / 3) and "accuracy_absent" not in figures
    with pytest.warns(UserWarning, match=r"all 10 scores are equal \(1.25\)"):
        figures = compute_preference_metrics(np.full((5, 2), 1.25))
    assert (figures["accuracy"], figures["ties"], figures["std_reward"]) == (0.5, 1.0, 0.0)
    for unwarned in ([[1.0, 1.0], [2.0, 2.0]], [[1.0, 1.0]]):  # scores differ, or there is but one pair
        assert compute_preference_metrics(np.array(unwarned))["accuracy"] == 0.5


def test_reliability_metrics_by_hand() -> None:
    """Pairs 0 and 3 share a prompt. Of 27 draws of three prompts, one gives pair 1 alone: accuracy 0 to 1."""
    figures = reliability_metrics(SCORES, np.array([2**62, 5, -(2**62), 2**62]))
    assert (figures["prompts"], figures["accuracy_ci95"]) == (3, [0.0, 1.0])
    shares = [1 / (1 + math.exp(margin)) for margin in MARGINS]
    assert figures["brier"] == pytest.approx(sum(share**2 for share in shares) / 4)
    gaps = (shares[0], 1 - 1 / (1 + math.e), 0, shares[3])  # each pair is alone in its bin; the second one is wrong
    assert figures["ece"] == pytest.approx(sum(gaps) / 4)
    assert figures["temperature"] > 1  # a wrong pair among three: less sure would be better


def test_it_is_a_module_of_evaluate_that_sees_all_pairs_at_once() -> None:
    metric = PreferenceMetrics()
    assert isinstance(metric, evaluate.Metric)
    for part in (slice(0, 3), slice(3, 4)):
        metric.add_batch(chosen=SCORES[part, 0], rejected=SCORES[part, 1])
    assert metric.compute() == compute_preference_metrics(SCORES)


def test_interval_is_that_of_drawing_whole_prompts_one_by_one() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, 40, 150)
    values = (rng.random(150) < rng.random(40)[prompts]).astype(float)
    rows = [values[prompts == prompt] for prompt in np.unique(prompts)]
    draws = [np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))]).mean() for _ in range(4000)]
    expected = bootstrap_interval(values, prompts)
    assert expected == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.015)
    assert bootstrap_interval(np.repeat(values, 5), np.repeat(prompts, 5)) == pytest.approx(expected, abs=1e-12)
    weights = rng.integers(1, 4, 150)
    twice = bootstrap_interval(np.repeat(values, weights), np.repeat(prompts, weights))
    assert bootstrap_interval(values, prompts, weights) == pytest.approx(twice, abs=1e-12)
    assert bootstrap_interval(np.array([1.0, 0.0]), np.array([7, 7])) is None
    assert bootstrap_interval(np.ones(10), np.arange(10)) == [1.0, 1.0]


def test_reliability_bins_by_hand() -> None:
    """Bins are 1/30 wide: a tie is in the first; confidence 0.8 in the tenth; a margin of 50 in the last."""
    bins = reliability_bins(np.array([0.0, math.log(4), -math.log(4), math.log(4), 50.0]))
    assert [part["pairs"] for part in bins] == [1, *[0] * 8, 3, *[0] * 4, 1]
    for place, expected in (
        (0, [0.5, 0.5 + 1 / 30, 1, 0.5, 0.5]),
        (9, [0.8, 0.8 + 1 / 30, 3, 0.8, 2 / 3]),
        (14, [1 - 1 / 30, 1.0, 1, 1.0, 1.0]),
    ):
        assert list(bins[place].values()) == pytest.approx(expected)
    assert (bins[5]["confidence"], bins[5]["accuracy"]) == (None, None)
    assert expected_calibration_error(bins) == pytest.approx(3 / 5 * (0.8 - 2 / 3))


def test_calibration_is_told_from_too_sure_and_too_timid() -> None:
    """Margins of one size m, 3 of 4 right, are best where sigmoid(m / T) = 3/4: T = m / ln 3, in any units."""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 1.5, 100_000))
    margin = np.where(rng.random(100_000) < expit(size), size, -size)  # positive as often as the sigmoid says
    errors = [expected_calibration_error(reliability_bins(scale * margin)) for scale in (1, 3, 1 / 3)]
    assert errors[0] < 0.01 and min(errors[1:]) > 0.1
    assert best_temperature(2.5 * margin) == pytest.approx(2.5, rel=0.03)
    for scale in (1e-6, 1.0, 1e6):
        found = best_temperature(scale * np.array([2.0, 2.0, -2.0, 2.0]))
        assert found == pytest.approx(2 * scale / math.log(3), rel=1e-4)
    for useless in ([1.0, 0.5], [1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0], [0.0, 0.0]):  # perfect, useless, collapsed
        assert best_temperature(np.array(useless)) is None


def test_paired_test_by_hand() -> None:
    """Better on 8, worse on 2, alike on 10: p = 2 (45 + 10 + 1) / 2^10; the difference is 6 of 20 pairs."""

    def table(margins: list[float], rows: range) -> pd.DataFrame:
        scores = {"chosen_score": margins, "rejected_score": 0.0}
        return pd.DataFrame({"row": rows, "prompt_id": rows, **scores})

    ours = table([1.0] * 8 + [-1.0] * 2 + [1.0] * 11, range(21))  # the last one is too long for the other
    theirs = table([-1.0] * 8 + [1.0] * 2 + [2.0] * 10, range(20))
    test, turned, same = (paired_test(*tables) for tables in ((ours, theirs), (theirs, ours), (ours, ours)))
    assert [test[name] for name in ("pairs", "better", "worse", "only_model", "only_baseline")] == [20, 8, 2, 1, 0]
    assert (test["accuracy"], test["baseline_accuracy"]) == (0.9, 0.6)
    assert (test["mcnemar_p"], test["accuracy_difference"]) == (pytest.approx(112 / 1024), pytest.approx(0.3))
    spread = 1.96 * math.sqrt((10 / 20 - 0.3**2) / 20)
    assert test["accuracy_difference_ci95"] == pytest.approx([0.3 - spread, 0.3 + spread], abs=0.06)
    assert (turned["accuracy_difference"], turned["only_baseline"]) == (-test["accuracy_difference"], 1)
    assert (same["accuracy_difference"], same["accuracy_difference_ci95"], same["mcnemar_p"]) == (0.0, [0.0, 0.0], 1.0)
