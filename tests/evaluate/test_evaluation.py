"""Every figure of an evaluation on tables worked by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from reward_recipes.evaluate.figures import REWARDBENCH, evaluation_figures


def table(margins: list[float], **columns: Any) -> pd.DataFrame:
    """Pairs with these margins, a prompt each; replies of 10 characters, dialogues of 100 tokens unless said."""
    count = len(margins)
    usual = {"chosen_score": np.array(margins) / 2, "rejected_score": -np.array(margins) / 2, "row": np.arange(count)}
    usual |= {"prompt_id": np.arange(count), "chosen_length": 100, "rejected_length": 1}
    usual |= {"chosen_characters": 10, "rejected_characters": 10}
    return pd.DataFrame(usual | {"subset": None} | columns)


def test_headline_figures_by_hand() -> None:
    """Margins 2, -1, 0, 0.5, -3: two and a half of five right."""
    figures = evaluation_figures(table([2.0, -1.0, 0.0, 0.5, -3.0], prompt_id=[7, 8, 8, 9, 9]))
    assert (figures["pairs"], figures["prompts"], figures["accuracy"], figures["ties"]) == (5, 3, 0.5, 0.2)
    assert figures["mean_margin"] == pytest.approx(-0.3)
    assert figures["brier"] == pytest.approx(np.mean([1 / (1 + np.exp(m)) ** 2 for m in (2, -1, 0, 0.5, -3)]))
    assert figures["temperature"] is None
    low, high = figures["accuracy_ci95"]
    assert low < 0.5 < high


def test_length_figures_by_hand() -> None:
    """Longer chosen, shorter chosen, equal, 9 against 10: the baseline is right, wrong, half right, right."""
    lengths = {"chosen_characters": [30, 10, 12, 10], "rejected_characters": [10, 40, 12, 9]}
    figures = evaluation_figures(table([1.0, -2.0, 3.0, -1.0], **lengths))
    assert figures["length_baseline_accuracy"] == 2.5 / 4
    assert (figures["pairs_equal_length"], figures["accuracy_equal_length"]) == (2, 0.5)
    expected = stats.spearmanr([1, -2, 3, -1], [20, -30, 0, 1]).statistic
    assert figures["length_correlation"] == pytest.approx(expected)


def test_no_pair_of_equal_length_and_no_correlation_without_variation() -> None:
    figures = evaluation_figures(table([1.0, 2.0], chosen_characters=20))
    assert (figures["pairs_equal_length"], figures["accuracy_equal_length"]) == (0, None)
    assert figures["length_correlation"] is None


def test_empty_replies_of_equal_length_count_as_equal() -> None:
    assert evaluation_figures(table([1.0], chosen_characters=0, rejected_characters=0))["pairs_equal_length"] == 1


def test_subsets_and_dialogue_lengths() -> None:
    columns = {"subset": ["b", "a", "b", "a"], "chosen_length": [1, 64, 65, 129], "prompt_id": [1, 2, 3, 2]}
    figures = evaluation_figures(table([1.0, -1.0, 1.0, 2.0], **columns))
    assert figures["subsets"] == {
        "a": {"pairs": 2, "accuracy": 0.5, "accuracy_ci95": None},
        "b": {"pairs": 2, "accuracy": 1.0, "accuracy_ci95": [1.0, 1.0]},
    }
    found = [(part["low"], part["high"], part["pairs"], part["accuracy"]) for part in figures["by_dialogue_length"]]
    assert found == [(1, 64, 2, 0.5), (65, 128, 1, 1.0), (129, 256, 1, 1.0)]
    assert evaluation_figures(table([1.0]))["subsets"] == {}


def test_histogram_holds_every_pair_and_parts_right_from_wrong() -> None:
    margins = [-4.0, -0.01, 0.0, 0.01, 3.99, 4.0]
    histogram = evaluation_figures(table(margins))["margin_histogram"]
    assert (len(histogram["edges"]), len(histogram["pairs"])) == (41, 40)
    assert histogram["edges"][20] == 0
    assert (sum(histogram["pairs"][:20]), sum(histogram["pairs"][20:])) == (2, 4)


def test_most_confidently_wrong_are_rows_of_the_source() -> None:
    margins = [3.0, -1.0, -5.0, 0.0, -2.0]
    figures = evaluation_figures(table(margins, row=[10, 11, 12, 13, 14]))
    assert figures["most_confidently_wrong"] == [
        {"row": 12, "margin": -5.0},
        {"row": 14, "margin": -2.0},
        {"row": 11, "margin": -1.0},
    ]
    many = evaluation_figures(table([-1.0 - i for i in range(50)]))["most_confidently_wrong"]
    assert [pair["row"] for pair in many] == list(range(49, 29, -1))


def test_swapped_sides_give_the_complement() -> None:
    pairs = table([2.0, -1.0, 0.0, 0.5, -3.0, 1.0])
    swapped = pairs.rename(columns={"chosen_score": "rejected_score", "rejected_score": "chosen_score"})
    ours, theirs = evaluation_figures(pairs), evaluation_figures(swapped)
    assert theirs["accuracy"] == pytest.approx(1 - ours["accuracy"])
    assert theirs["accuracy_ci95"] == pytest.approx([1 - end for end in reversed(ours["accuracy_ci95"])])
    assert (theirs["ties"], theirs["mean_margin"]) == (ours["ties"], -ours["mean_margin"])


def test_a_perfect_model() -> None:
    figures = evaluation_figures(table([1.0, 2.0, 3.0]))
    assert (figures["accuracy"], figures["accuracy_ci95"], figures["temperature"]) == (1.0, [1.0, 1.0], None)
    assert figures["most_confidently_wrong"] == []


def test_a_collapsed_model() -> None:
    with pytest.warns(UserWarning, match="collapsed"):
        figures = evaluation_figures(table([0.0] * 8, chosen_characters=[5, 15] * 4))
    assert (figures["accuracy"], figures["ties"], figures["ece"], figures["temperature"]) == (0.5, 1.0, 0.0, None)
    assert sum(figures["margin_histogram"]["pairs"]) == 8


def test_a_single_pair() -> None:
    figures = evaluation_figures(table([1.0]))
    assert (figures["pairs"], figures["accuracy"], figures["accuracy_ci95"]) == (1, 1.0, None)


def test_rewardbench_categories_by_hand() -> None:
    """Two pairs of each subset, all right, but one of 2 llmbar-natural, both math-prm and one of 2 hep-go wrong."""
    subsets = [name for names in REWARDBENCH.values() for name in names for _ in range(2)]
    wrong = {"llmbar-natural": 1, "math-prm": 2, "hep-go": 1}
    margins = [-1.0 if i % 2 < wrong.get(name, 0) else 1.0 for i, name in enumerate(subsets)]
    categories = evaluation_figures(table(margins, subset=subsets))["categories"]
    assert {name: part["accuracy"] for name, part in categories.items()} == {
        "Chat": 1.0,
        "Chat Hard": pytest.approx(11 / 12),
        "Safety": 1.0,
        "Reasoning": pytest.approx((0 + 11 / 12) / 2),  # mathematics and programs weigh the same
    }
    assert [part["pairs"] for part in categories.values()] == [10, 12, 10, 14]


def test_half_a_category_is_none() -> None:
    subsets = [*REWARDBENCH["Chat"], "mt-bench-hard", "math-prm"]
    assert list(evaluation_figures(table([1.0] * 7, subset=subsets))["categories"]) == ["Chat"]
