"""What an evaluation says of scored pairs: every figure of the report, by subset and by length too."""

from typing import Any

import numpy as np
import pandas as pd
import scipy

from reward_recipes.evaluate.uncertainty import (
    bootstrap_interval,
    compute_preference_metrics,
    credit,
    pairwise_accuracy,
    reliability_bins,
    reliability_metrics,
)

EQUAL_LENGTH = 0.9
SHORTEST_DIALOGUES = 64
MOST_WRONG = 20
HALF_OF_HISTOGRAM = 20

_MATH = "math-prm"
# The subsets of RewardBench's categories: `rewardbench/constants.py` of github.com/allenai/reward-bench.
REWARDBENCH = {
    "Chat": ["alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"],
    "Chat Hard": [
        *("mt-bench-hard", "llmbar-natural", "llmbar-adver-manual"),
        *("llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut"),
    ],
    "Safety": [
        *("refusals-dangerous", "refusals-offensive", "donotanswer"),
        *("xstest-should-refuse", "xstest-should-respond"),
    ],
    "Reasoning": [_MATH, *(f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust"))],
}


def evaluation_figures(pairs: pd.DataFrame) -> dict[str, Any]:
    """All figures of one model on the pairs that it could score.

    Args:
        pairs: one row a pair, at least one; the columns of `test_split.score_table` (lengths before any cut), and
            `chosen_characters` and `rejected_characters` of the last reply.

    Returns:
        What `PreferenceMetrics` (its `margin` as `mean_margin`) and `reliability_metrics` give, and

        - `length_baseline_accuracy`: of always preferring the longer text, in tokens, a tie half; `length_correlation`:
          Spearman's between margin and difference in tokens, None where one of them never varies;
        - `pairs_equal_length`, `accuracy_equal_length`, `accuracy_ci95_equal_length`: of pairs whose shorter reply has
          at least 0.9 of the characters of the longer (None without such pairs);
        - `subsets`: by name `pairs`, `accuracy`, `accuracy_ci95`; `categories` the same for RewardBench's;
        - `by_dialogue_length`: the same by tokens of the longer side (`low`, `high`, inclusive, doubling from 64);
        - `margin_histogram`: `edges` (41), `pairs` (40) of the margins, 0 being an edge; `reliability`: see
          `uncertainty.reliability_bins`;
        - `most_confidently_wrong`: up to 20 of `row` and `margin`, the worst first.
    """
    scores = pairs[["chosen_score", "rejected_score"]].to_numpy(dtype=np.float64)
    margin, prompts = scores[:, 0] - scores[:, 1], pairs.prompt_id.to_numpy()
    pairs = pairs.assign(margin=margin)
    overall = compute_preference_metrics(scores) | reliability_metrics(scores, prompts)
    overall["mean_margin"] = overall.pop("margin")
    worst = pairs[margin < 0].nsmallest(MOST_WRONG, "margin")
    return {
        **overall,
        **_length_figures(pairs),
        "subsets": {name: _accuracy(part) for name, part in pairs.groupby("subset")},
        "categories": _rewardbench_categories(pairs),
        "by_dialogue_length": _by_dialogue_length(pairs),
        "margin_histogram": _histogram(margin),
        "reliability": reliability_bins(margin),
        "most_confidently_wrong": worst[["row", "margin"]].to_dict("records"),
    }


def _accuracy(pairs: pd.DataFrame, weights: np.ndarray | None = None) -> dict[str, Any]:
    right = credit(pairs.margin.to_numpy())
    interval = bootstrap_interval(right, pairs.prompt_id.to_numpy(), weights)
    return {"pairs": len(pairs), "accuracy": float(np.average(right, weights=weights)), "accuracy_ci95": interval}


def _length_figures(pairs: pd.DataFrame) -> dict[str, Any]:
    lengths = pairs[["chosen_characters", "rejected_characters"]]
    difference = (pairs.chosen_length - pairs.rejected_length).to_numpy()
    equal = pairs[lengths.min(axis=1) >= EQUAL_LENGTH * lengths.max(axis=1)]
    alike = {"pairs": 0, "accuracy": None, "accuracy_ci95": None} if equal.empty else _accuracy(equal)
    varies = np.ptp(difference) > 0 and np.ptp(pairs.margin) > 0
    return {
        "length_baseline_accuracy": pairwise_accuracy(difference),
        "length_correlation": float(scipy.stats.spearmanr(pairs.margin, difference).statistic) if varies else None,
        **{f"{name}_equal_length": value for name, value in alike.items()},
    }


def _by_dialogue_length(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    tokens = pairs[["chosen_length", "rejected_length"]].max(axis=1)
    power_of_two = 2 ** np.ceil(np.log2(tokens)).astype(int)
    parts = []
    for high, part in pairs.groupby(power_of_two.clip(lower=SHORTEST_DIALOGUES)):
        low = 1 if high == SHORTEST_DIALOGUES else high // 2 + 1
        parts.append({"low": int(low), "high": int(high), **_accuracy(part)})
    return parts


def _histogram(margin: np.ndarray) -> dict[str, list[Any]]:
    reach = float(np.abs(margin).max()) or 1.0
    edges = reach * (np.arange(-HALF_OF_HISTOGRAM, HALF_OF_HISTOGRAM + 1) / HALF_OF_HISTOGRAM)
    return {"edges": edges.tolist(), "pairs": np.histogram(margin, bins=edges)[0].tolist()}


def _rewardbench_categories(pairs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """RewardBench's averages (Lambert et al., 2024, arXiv 2403.13787), of the categories whose subsets are all there.

    In Reasoning the mathematical pairs together weigh as much as the programs: 447 pairs count as 984.
    """
    categories = {}
    for name, subsets in REWARDBENCH.items():
        if set(subsets) <= set(pairs.subset):
            part = pairs[pairs.subset.isin(subsets)]
            is_math = (part.subset == _MATH).to_numpy()
            weights = np.where(is_math, (~is_math).sum() / max(1, is_math.sum()), 1.0)
            categories[name] = _accuracy(part, weights)
    return categories
