"""Statistics of several runs against numbers worked by hand, and against what was planted."""

import numpy as np
import pandas as pd
import pytest
from across_seeds import agreement, compute, learning_curve, mean_over_runs

SIZES = np.repeat([409, 818, 1636, 3272], 3)


def test_mean_of_runs() -> None:
    """50, 52, 54 have mean 52 and deviation 2: Student's t of 2 degrees gives 52 -+ 4.303 x 2 / sqrt(3)."""
    mean, interval = mean_over_runs(pd.Series([0.50, 0.52, 0.54]))
    assert (mean, interval) == (pytest.approx(0.52), pytest.approx((0.52 - 0.04969, 0.52 + 0.04969), abs=1e-5))
    assert mean_over_runs(pd.Series([0.02, 0.02, 0.02])).interval == pytest.approx((0.02, 0.02))
    assert mean_over_runs(pd.Series([0.5, 0.6])) == (pytest.approx(0.55), None)


def test_agreement_of_three_runs_with_ties() -> None:
    """Of 4 pairs first and second agree on 2 and half a tie, first and third on 1, second and third on 1 and a half."""
    margins = np.array([[3.0, 1.0, -2.0, 0.5], [0.1, 0.0, -9.0, -1.0], [-1.0, 2.0, 1.0, -4.0]]).T
    assert agreement(margins) == pytest.approx((2.5 + 1 + 1.5) / 12)
    assert agreement(margins[:, :2] * [1, 50]) == 2.5 / 4


def test_compute_takes_the_tokens_that_were_computed() -> None:
    cost = {"weights": 1000, "num_tokens": 7, "num_unique_tokens": 5, "num_padded_tokens": 11}
    assert compute(cost | {"packed": True}) == 30_000 and compute(cost | {"packed": False}) == 66_000


def test_learning_curve_intervals_cover_a_planted_line_and_grow_with_the_distance() -> None:
    """About 95% of 200 draws: by chance fewer than 180 or more than 199 once in a thousand times."""
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(200):
        drawn = 0.52 + 0.01 * np.log2(SIZES / 409) + rng.normal(0, 0.01, len(SIZES))
        (_, slope), (_, beyond) = learning_curve(SIZES, drawn, at=409 * 2**8)
        covered += [slope[0] <= 0.01 <= slope[1], beyond[0] <= 0.60 <= beyond[1]]
    assert all(180 <= covered) and all(covered < 200)
    widths = [np.ptp(learning_curve(SIZES, drawn, at)[1].interval) for at in (1157, 3272, 10_000, 144_720)]
    assert widths == sorted(widths) and widths[-1] > 3 * widths[0]
