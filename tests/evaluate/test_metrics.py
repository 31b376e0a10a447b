"""The metrics of Hugging Face's `evaluate` on scores worked by hand: a tie counts a half, all pairs count alike."""

import math

import evaluate
import numpy as np
import pytest

from reward_recipes.evaluate import compute_preference_metrics
from reward_recipes.evaluate.metrics import PreferenceMetrics, compute_reliability_metrics

# Margins 2, -1, 0, 0.5: two right, one wrong, one tie.
SCORES = np.array([[3.0, 1.0], [0.0, 1.0], [2.0, 2.0], [0.5, 0.0]])
MARGINS = (2.0, -1.0, 0.0, 0.5)


def test_figures_by_hand() -> None:
    """Accuracy (1 + 0 + 1/2 + 1) / 4; loss the mean of ln(1 + e^-m); eight scores sum to 9.5."""
    squares = 3**2 + 1 + 0 + 1 + 2**2 + 2**2 + 0.5**2 + 0
    assert compute_preference_metrics(SCORES) == {
        "accuracy": 0.625,
        "ties": 0.25,
        "loss": pytest.approx(sum(math.log(1 + math.exp(-margin)) for margin in MARGINS) / 4, rel=1e-12),
        "margin": 0.375,
        "mean_reward": pytest.approx(9.5 / 8),
        "std_reward": pytest.approx(math.sqrt(squares / 8 - (9.5 / 8) ** 2)),
        "pairs": 4,
    }


def test_reliability_by_hand() -> None:
    """Pairs 0 and 3 share a prompt. Of 27 draws of three prompts, one gives pair 1 alone: accuracy 0 to 1."""
    figures = compute_reliability_metrics(SCORES, np.array([2**62, 5, -(2**62), 2**62]))
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


def test_swapped_sides_give_the_complement() -> None:
    figures, swapped = (compute_preference_metrics(scores) for scores in (SCORES, SCORES[:, ::-1]))
    assert swapped["accuracy"] == 1 - figures["accuracy"] == 0.375
    assert (swapped["margin"], swapped["ties"]) == (-figures["margin"], figures["ties"])
    assert swapped["loss"] == pytest.approx(figures["loss"] + figures["margin"])  # -log s(-m) = m - log s(m)


def test_a_collapsed_model_gets_one_half_and_a_warning_but_tied_pairs_do_not() -> None:
    with pytest.warns(UserWarning, match=r"all 10 scores are equal \(1.25\)"):
        figures = compute_preference_metrics(np.full((5, 2), 1.25))
    assert (figures["accuracy"], figures["ties"], figures["std_reward"]) == (0.5, 1.0, 0.0)
    assert figures["loss"] == pytest.approx(math.log(2))
    assert compute_preference_metrics(np.array([[1.0, 1.0], [2.0, 2.0]]))["accuracy"] == 0.5


@pytest.mark.parametrize(("scores", "accuracy"), [([1.0, 0.0], 1.0), ([0.0, 1.0], 0.0), ([1.0, 1.0], 0.5)])
def test_a_single_pair(scores: list[float], accuracy: float) -> None:
    figures = compute_preference_metrics(np.array([scores]))
    assert (figures["accuracy"], figures["pairs"]) == (accuracy, 1)


def test_large_margins_neither_overflow_nor_lose_the_loss() -> None:
    assert compute_preference_metrics(np.array([[0.0, 2000.0], [2000.0, 0.0]]))["loss"] == 1000.0


def test_accuracy_of_each_subset() -> None:
    """Pairs 0, 1 and 3 are helpful (right, wrong, right), pair 2 is harmless (a tie); nothing is left out or empty."""
    figures = compute_preference_metrics(SCORES, np.array([1, 1, 0, 1]), ["harmless", "helpful", "absent"])
    assert (figures["accuracy_harmless"], figures["accuracy"]) == (0.5, 0.625)
    assert figures["accuracy_helpful"] == pytest.approx(2 / 3) and "accuracy_absent" not in figures
