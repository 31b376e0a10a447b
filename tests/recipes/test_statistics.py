"""Statistics of several runs against numbers worked by hand, and against what was planted."""

import numpy as np
import pytest
from across_seeds import LearningCurve, Mean, agreement, compute, difference, ensemble, mean_over_runs

SIZES = np.repeat([409, 818, 1636, 3272], 3)


def test_mean_of_three_runs() -> None:
    """50, 52, 54 have mean 52 and deviation 2: Student's t of 2 degrees gives 52 -+ 4.303 x 2 / sqrt(3)."""
    found = mean_over_runs([0.50, 0.52, 0.54])
    assert (found.mean, found.deviation) == pytest.approx((0.52, 0.02))
    assert found.interval == pytest.approx((0.52 - 0.04969, 0.52 + 0.04969), abs=1e-5)


def test_mean_of_one_run_has_no_interval() -> None:
    assert mean_over_runs(iter([0.5])) == Mean(0.5, None, None)


def test_difference_is_over_common_seeds_alone() -> None:
    """Seeds 1 to 3 gain 0.1, 0.3, 0.2: mean 0.2, deviation 0.1, and with two degrees -+ 4.303 x 0.1 / sqrt(3)."""
    found = difference({1: 0.6, 2: 0.9, 3: 0.4, 4: 9.9}, {0: -9.9, 1: 0.5, 2: 0.6, 3: 0.2})
    assert found is not None and found.mean == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - 0.2484, 0.2 + 0.2484), abs=1e-4)
    two = difference({1: 0.6, 2: 0.9}, {1: 0.5, 2: 0.6})
    assert two is not None and (two.interval, two.deviation) == (None, pytest.approx(0.1414, abs=1e-4))
    assert difference({1: 0.6}, {2: 0.6}) is None


def test_a_paired_difference_is_surer_than_two_means() -> None:
    """What seeds have in common cancels."""
    baseline = {1: 0.50, 2: 0.60, 3: 0.70}
    found = difference({seed: value + 0.02 for seed, value in baseline.items()}, baseline)
    assert found is not None and found.interval == pytest.approx((0.02, 0.02))


def test_agreement_of_three_runs_with_ties() -> None:
    """Of 4 pairs first and second agree on 2 and half a tie, first and third on 1, second and third on 1 and a half."""
    margins = np.array([[3.0, 1.0, -2.0, 0.5], [0.1, 0.0, -9.0, -1.0], [-1.0, 2.0, 1.0, -4.0]])
    assert agreement(margins) == pytest.approx((2.5 + 1 + 1.5) / 12)
    assert agreement(margins[:2] * [[1], [50]]) == 2.5 / 4
    assert agreement(np.zeros((2, 3))) == 0.5


def test_ensemble_gives_every_run_one_vote() -> None:
    """Root mean squares of 2.5 and 250 make (1.2, -1.6, 0, 0) and (0, 0, 1.2, 1.6). A run of ties alone has no vote."""
    assert ensemble(np.array([[3, -4, 0, 0], [0, 0, 300, 400]])) == pytest.approx([0.6, -0.8, 0.6, 0.8])
    assert ensemble(np.array([[1.0, -1.0], [0.0, 0.0]])) == pytest.approx([0.5, -0.5])


def test_compute_takes_the_tokens_that_were_computed() -> None:
    cost = {"weights": 1000, "num_tokens": 7, "num_unique_tokens": 5, "num_padded_tokens": 11}
    assert compute(cost | {"packed": True}) == 30_000 and compute(cost | {"packed": False}) == 66_000


def test_learning_curve_worked_by_hand() -> None:
    """53 and 55 two doublings apart, deviation 1: 1 -+ 2.776 / sqrt(6) points a doubling; 54 -+ the same half way."""
    curve = LearningCurve(np.array([256] * 3 + [1024] * 3), np.array([0.52, 0.53, 0.54, 0.54, 0.55, 0.56]))
    assert curve.per_doubling == pytest.approx((0.01, 0.01 - 0.01133, 0.01 + 0.01133), abs=1e-5)
    assert curve.at(512) == pytest.approx((0.54, 0.54 - 0.01133, 0.54 + 0.01133), abs=1e-5)
    assert curve.at(2048)[0] == pytest.approx(0.56)


def test_learning_curve_intervals_cover_a_planted_line() -> None:
    """About 95% of 200 draws: by chance fewer than 180 or more than 199 once in a thousand times."""
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(200):
        curve = LearningCurve(SIZES, 0.52 + 0.01 * np.log2(SIZES / 409) + rng.normal(0, 0.01, len(SIZES)))
        _, *slope = curve.per_doubling
        _, *beyond = curve.at(409 * 2**8)
        covered += [slope[0] <= 0.01 <= slope[1], beyond[0] <= 0.60 <= beyond[1]]
    assert all(180 <= covered) and all(covered < 200)


def test_the_reach_grows_with_the_distance() -> None:
    curve = LearningCurve(SIZES, 0.52 + np.random.default_rng(1).normal(0, 0.01, len(SIZES)))
    widths = [high - low for _, low, high in map(curve.at, (1157, 3272, 10_000, 144_720))]
    assert widths == sorted(widths) and widths[-1] > 3 * widths[0]
