"""How good pairwise scores are: a metric of Hugging Face's `evaluate` over all pairs of a data set."""

import warnings
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from reward_recipes.evaluate.uncertainty import bradley_terry_loss, pairwise_accuracy


class PreferenceMetrics(evaluate.Metric):
    """How good a reward model's scores are on preference pairs.

    `compute(chosen=..., rejected=...)` takes two sequences of n scores and returns, with m = chosen - rejected:

    - `accuracy`: share of pairs with m > 0, a tie (m = 0) counting half; `ties`: share of pairs with m = 0;
    - `loss`: mean of -log sigmoid(m), the negative log-likelihood of Bradley and Terry's model (in nats);
    - `margin`: mean of m; `mean_reward` and `std_reward`: mean and standard deviation of all 2n scores;
    - `pairs`: n.

    It sees all scores at once, so batches do not matter. It warns when all scores are equal: the model ranks nothing.
    """

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="Bradley and Terry (1952), Rank Analysis of Incomplete Block Designs, Biometrika 39(3/4).",
            features=datasets.Features(dict.fromkeys(("chosen", "rejected"), datasets.Value("float64"))),
        )

    def _compute(self, chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, float]:
        scores = np.asarray([chosen, rejected], dtype=np.float64)
        if scores.shape[1] > 1 and np.ptp(scores) == 0:
            found = f"all {scores.size} scores are equal ({scores.flat[0]:.4g})"
            warnings.warn(f"{found}: the reward model has collapsed and ranks nothing", stacklevel=2)
        margin = scores[0] - scores[1]
        return {
            "accuracy": pairwise_accuracy(margin),
            "ties": float(np.mean(margin == 0)),
            "loss": bradley_terry_loss(margin),
            "margin": float(np.mean(margin)),
            "mean_reward": float(np.mean(scores)),
            "std_reward": float(np.std(scores)),
            "pairs": scores.shape[1],
        }
