"""What an evaluation says of scored pairs: every figure of the report, by subset, length and margin too."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from reward_recipes.evaluate.metrics import compute_preference_metrics, compute_reliability_metrics
from reward_recipes.evaluate.uncertainty import accuracy_figures, pairwise_accuracy, reliability_bins

EQUAL_LENGTH = 0.9
MOST_WRONG = 20
MARGIN_GROUPS = 5
HISTOGRAM_BINS = 40

_CHAT = ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med")
_CHAT_HARD = (
    *("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut"),
    "llmbar-adver-manual",
)
_SAFETY = (
    *("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond"),
    "donotanswer",
)
_CODE = ("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust")
_MATH = "math-prm"
REWARDBENCH = {"Chat": _CHAT, "Chat Hard": _CHAT_HARD, "Safety": _SAFETY, "Reasoning": (_MATH, *_CODE)}


def evaluation_figures(pairs: pd.DataFrame) -> dict[str, Any]:
    """All figures of one model on the pairs that it could score.

    Args:
        pairs: one row a pair, at least one; columns `chosen` and `rejected` (scores), `row` (number in the source),
            `prompt_id`, `tokens` (of the longer side, before any cut), `chosen_characters` and `rejected_characters`
            (of the last reply), `subset` (a name, or None in every row).

    Returns:
        What `metrics.PreferenceMetrics` (its `margin` as `mean_margin`) and `metrics.ReliabilityMetrics` give, and

        - `length_baseline_accuracy`: of always preferring the longer last reply, a tie half; `length_correlation`:
          Spearman's between margin and difference in characters, None where one of them never varies;
        - `pairs_equal_length`, `accuracy_equal_length`, `accuracy_ci95_equal_length`: of pairs whose shorter reply has
          at least 0.9 of the characters of the longer (None without such pairs);
        - `subsets`: by name `pairs`, `accuracy`, `accuracy_ci95`; `categories` the same for RewardBench's;
        - `by_dialogue_length`: the same by `tokens` (`low` and `high`, inclusive, doubling from 64); `by_margin`: by
          fifths of |m|, from the least to the most certain, with `low` and `high` the extremes of |m|;
        - `margin_histogram`: `edges` (41), `pairs` (40) of the margins, 0 being an edge; `reliability`: see
          `uncertainty.reliability_bins`;
        - `most_confidently_wrong`: up to 20 of `row` and `margin`, the worst first.
    """
    scores = pairs[["chosen", "rejected"]].to_numpy(dtype=np.float64)
    margin, prompts = scores[:, 0] - scores[:, 1], pairs.prompt_id.to_numpy()
    pairs = pairs.assign(margin=margin)
    overall = compute_preference_metrics(scores) | compute_reliability_metrics(scores, prompts)
    overall["mean_margin"] = overall.pop("margin")
    return {
        **overall,
        **_length_figures(pairs),
        "subsets": _by(pairs, pairs.subset),
        "categories": rewardbench_categories(pairs),
        "by_dialogue_length": _by_dialogue_length(pairs),
        "by_margin": _by_margin(pairs),
        "margin_histogram": _histogram(margin),
        "reliability": reliability_bins(margin),
        "most_confidently_wrong": [
            {"row": int(pair.row), "margin": float(pair.margin)}
            for pair in pairs[margin < 0].nsmallest(MOST_WRONG, "margin").itertuples()
        ],
    }


def _length_figures(pairs: pd.DataFrame) -> dict[str, Any]:
    chosen, rejected = pairs.chosen_characters.to_numpy(), pairs.rejected_characters.to_numpy()
    difference, margin = chosen - rejected, pairs.margin.to_numpy()
    equal = np.minimum(chosen, rejected) >= EQUAL_LENGTH * np.maximum(chosen, rejected)
    alike = _figures(pairs[equal]) if equal.any() else {"pairs": 0, "accuracy": None, "accuracy_ci95": None}
    varies = np.ptp(difference) > 0 and np.ptp(margin) > 0
    return {
        "length_baseline_accuracy": pairwise_accuracy(difference),
        "length_correlation": float(stats.spearmanr(margin, difference).statistic) if varies else None,
    } | {f"{name}_equal_length": value for name, value in alike.items()}


def _figures(pairs: pd.DataFrame, weights: np.ndarray | None = None) -> dict[str, Any]:
    return accuracy_figures(pairs.margin.to_numpy(), pairs.prompt_id.to_numpy(), weights)


def _by(pairs: pd.DataFrame, key: pd.Series) -> dict[Any, dict[str, Any]]:
    return {name: _figures(part) for name, part in pairs.groupby(key, observed=True)}


def _by_dialogue_length(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    highest = 2 ** np.maximum(6, np.ceil(np.log2(pairs.tokens))).astype(int)
    groups = _by(pairs, highest)
    return [{"low": 1 if high == 64 else int(high) // 2 + 1, "high": int(high)} | groups[high] for high in groups]


def _by_margin(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """Many equal margins (a collapsed model's, say) share one group, so that there may be fewer than five."""
    size = pairs.margin.abs()
    fifth = pd.qcut(size, MARGIN_GROUPS, duplicates="drop") if size.nunique() > 1 else pd.Series(0, pairs.index)
    return [
        {"low": float(part.margin.abs().min()), "high": float(part.margin.abs().max())} | _figures(part)
        for _, part in pairs.groupby(fifth, observed=True)
    ]


def _histogram(margin: np.ndarray) -> dict[str, list[Any]]:
    reach = float(np.abs(margin).max()) or 1.0
    half = HISTOGRAM_BINS // 2
    pairs, edges = np.histogram(margin, bins=reach * (np.arange(-half, half + 1) / half))
    return {"edges": edges.tolist(), "pairs": pairs.tolist()}


def rewardbench_categories(pairs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """RewardBench's category averages, of the categories whose subsets are all there.

    An average over all pairs of a category, but in Reasoning the mathematical pairs together weigh as much as the
    programs: 447 pairs count as 984. Source: Lambert et al. (2024), RewardBench, arXiv 2403.13787, and
    `rewardbench/constants.py` of github.com/allenai/reward-bench.

    Args:
        pairs: columns `subset`, `margin` and `prompt_id`.
    """
    present = set(pairs.subset)
    categories = {}
    for name, subsets in REWARDBENCH.items():
        if present.issuperset(subsets):
            part = pairs[pairs.subset.isin(subsets)]
            is_math = (part.subset == _MATH).to_numpy()
            weights = np.where(is_math, (~is_math).sum() / max(1, is_math.sum()), 1.0)
            categories[name] = _figures(part, weights)
    return categories
