"""Every figure of an evaluation on tables worked by hand; the page doubts what its figures call for and no more."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from scipy import stats

from reward_recipes.evaluate.evaluation import format_report, headline
from reward_recipes.evaluate.figures import REWARDBENCH, evaluation_figures
from reward_recipes.evaluate.picture import draw_report

SETTINGS = {"model": "m", "dataset": "d", "split": "train", "dtype": "float32", "max_length": 64, "overlong": "drop"}
SETTINGS["convention"] = "read as in its training"


def figures_of(margins: Any, **columns: Any) -> dict[str, Any]:
    """Pairs with these margins, a prompt each; replies of 10 characters, texts of 100 tokens unless said."""
    count = len(margins)
    half = np.array(margins) / 2
    usual = {"chosen_score": half, "rejected_score": -half, "row": np.arange(count), "prompt_id": np.arange(count)}
    usual |= {"chosen_length": 100, "rejected_length": 100, "chosen_characters": 10, "rejected_characters": 10}
    found = evaluation_figures(pd.DataFrame(usual | {"subset": None} | columns))
    return found | {"pairs_read": count, "cut": 0, "dropped": {"blank": 0}, "split": "test"}


def doubts(found: dict[str, Any]) -> list[str]:
    """The sentences under "What to doubt" on the page of a report."""
    page = format_report(SETTINGS | found, [])
    return page.split("## What to doubt")[1].split("##")[0].strip().removeprefix("- ").split("\n- ")


def sound(count: int = 400) -> np.ndarray:
    """Margins of one size, three of four right, as sure as they should be: sigmoid(ln 3) = 3/4."""
    return np.log(3) * np.where(np.arange(count) % 4 == 0, -1, 1)


def test_headline_figures_by_hand_and_their_complement_for_swapped_sides() -> None:
    """Margins 2, -1, 0, 0.5, -3: two and a half of five right."""
    margins = np.array([2.0, -1.0, 0.0, 0.5, -3.0])
    figures, swapped = (figures_of(sign * margins, prompt_id=[7, 8, 8, 9, 9]) for sign in (1, -1))
    assert (figures["pairs"], figures["prompts"], figures["accuracy"], figures["ties"]) == (5, 3, 0.5, 0.2)
    assert (figures["mean_margin"], figures["temperature"]) == (pytest.approx(-0.3), None)
    low, high = figures["accuracy_ci95"]
    assert low < 0.5 < high and swapped["accuracy_ci95"] == pytest.approx([1 - high, 1 - low])
    assert figures["most_confidently_wrong"] == [{"row": 4, "margin": -3.0}, {"row": 1, "margin": -1.0}]
    assert len(figures_of([-1.0 - i for i in range(50)])["most_confidently_wrong"]) == 20


def test_length_figures_by_hand() -> None:
    """Longer chosen, shorter chosen, equal, 9 against 10: the baseline is right, wrong, half right, right."""
    chosen, rejected = [30, 10, 12, 10], [10, 40, 12, 9]
    lengths = {"chosen_characters": chosen, "rejected_characters": rejected}
    lengths |= {"chosen_length": chosen, "rejected_length": rejected}
    figures = figures_of([1.0, -2.0, 3.0, -1.0], **lengths)
    assert figures["length_baseline_accuracy"] == 2.5 / 4
    assert (figures["pairs_equal_length"], figures["accuracy_equal_length"]) == (2, 0.5)
    expected = stats.spearmanr([1, -2, 3, -1], [20, -30, 0, 1]).statistic
    assert figures["length_correlation"] == pytest.approx(expected)
    figures = figures_of([1.0, 2.0], chosen_characters=20)
    assert (figures["pairs_equal_length"], figures["accuracy_equal_length"]) == (0, None)
    assert figures["length_correlation"] is None
    assert figures_of([1.0], chosen_characters=0, rejected_characters=0)["pairs_equal_length"] == 1


def test_subsets_dialogue_lengths_and_histogram() -> None:
    """The histogram parts right pairs from wrong ones; a tie counts with the right ones."""
    columns = {"subset": ["b", "a", "b", "a"], "chosen_length": [1, 64, 65, 129], "rejected_length": 1}
    figures = figures_of([1.0, -1.0, 1.0, 2.0], prompt_id=[1, 2, 3, 2], **columns)
    assert figures["subsets"] == {
        "a": {"pairs": 2, "accuracy": 0.5, "accuracy_ci95": None},
        "b": {"pairs": 2, "accuracy": 1.0, "accuracy_ci95": [1.0, 1.0]},
    }
    found = [(part["low"], part["high"], part["pairs"], part["accuracy"]) for part in figures["by_dialogue_length"]]
    assert found == [(1, 64, 2, 0.5), (65, 128, 1, 1.0), (129, 256, 1, 1.0)]
    figures = figures_of([-4.0, -0.01, 0.0, 0.01, 3.99, 4.0])
    edges, pairs = figures["margin_histogram"].values()
    assert figures["subsets"] == {} and (len(edges), len(pairs), edges[20]) == (41, 40, 0)
    assert (sum(pairs[:20]), sum(pairs[20:])) == (2, 4)


def test_a_collapsed_model_and_a_lone_pair() -> None:
    with pytest.warns(UserWarning, match="collapsed"):
        figures = figures_of([0.0] * 8)
    assert (figures["accuracy"], figures["ece"], sum(figures["margin_histogram"]["pairs"])) == (0.5, 0.0, 8)
    told = " ".join(doubts(figures))
    assert "the model has collapsed" in told and "no better than a coin" in told
    figures = figures_of([1.0])
    assert (figures["pairs"], figures["accuracy"], figures["accuracy_ci95"]) == (1, 1.0, None)


def test_rewardbench_categories_by_hand() -> None:
    """Two pairs of each subset, all right, but one of 2 llmbar-natural, both math-prm and one of 2 hep-go wrong."""
    subsets = [name for names in REWARDBENCH.values() for name in names for _ in range(2)]
    wrong = {"llmbar-natural": 1, "math-prm": 2, "hep-go": 1}
    margins = [-1.0 if i % 2 < wrong.get(name, 0) else 1.0 for i, name in enumerate(subsets)]
    categories = figures_of(margins, subset=subsets)["categories"]
    assert list(categories) == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    reasoning = (0 + 11 / 12) / 2  # mathematics and programs weigh the same
    assert [part["accuracy"] for part in categories.values()] == pytest.approx([1, 11 / 12, 1, reasoning])
    assert [part["pairs"] for part in categories.values()] == [10, 12, 10, 14]
    some = [*REWARDBENCH["Chat"], "mt-bench-hard", "math-prm"]
    assert list(figures_of([1.0] * 7, subset=some)["categories"]) == ["Chat"]


def test_doubts_are_those_that_figures_call_for() -> None:
    """The last ones have the longer text chosen in every other four pairs: length says nothing of right and wrong."""
    chosen_longer = {"chosen_length": np.where(np.arange(400) % 4 == 0, 100, 190)}
    for margins, columns, words in (
        (3 * sound(), {}, "too sure of itself: margins divided by 3 "),
        (sound() / 2, {}, "too timid: margins divided by 0.5 "),
        (sound(40), {}, "Only 40 different first turns"),
        (np.abs(sound(300)), {}, "the interval has no width; up to 1.0% "),
        (np.where(np.arange(400) % 10 == 0, 0, sound()), {}, "10.0% of the pairs are ties"),
        (-sound(), {}, "The loss is no lower than a coin's (0.6931)"),
        (sound(), chosen_longer, "the longer text, in tokens, reaches 87.5%"),
        (sound(), chosen_longer, "leans towards longer texts"),
        (np.sort(sound()), {"subset": ["low"] * 200 + ["high"] * 200}, "in `low` to 100.0% ("),
    ):
        assert any(words in doubt for doubt in doubts(figures_of(margins, **columns))), words
    longer = np.where(np.arange(400) // 4 % 2, 20, 10)
    (always,) = doubts(figures_of(sound(), chosen_length=longer, rejected_length=30 - longer))
    assert "other prompts like these" in always


def test_page_headline_and_picture(tmp_path: Path) -> None:
    """Subsets that are alike are not told apart. The picture shows right, wrong and tied pairs."""
    margins = np.where(np.arange(400) % 40 == 1, 0, sound())
    found = figures_of(margins, subset=["a|b"] * 200 + ["c"] * 200) | SETTINGS | {"cut": 3}
    texts = {"shared": "word " * 60, "chosen": " Yes.", "rejected": ""}
    page = format_report(found, [{"row": 4, "margin": -1.1, **texts}])
    assert headline(found).startswith("accuracy 73.8% (95% interval ")
    assert "| `a\\|b` | 73.8% (" in page and "(evaluation.png)" in page and "range of subsets" not in page
    quoted = page.split("Row 4, margin -1.10:\n\n")[1].splitlines()
    assert quoted[0].startswith("    shared  ... word word ") and quoted[-2:] == [
        *("    better  Yes.", "    worse   (nothing more)"),
    ]
    assert "3 pairs were scored without their beginning" in page and "The split is called `train`" in page
    draw_report(found, tmp_path / "out.png")
    pixels = np.round(imread(tmp_path / "out.png")[..., :3] * 255).astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x80, 0x80, 0x80)):
        assert (pixels == colour).all(axis=-1).sum() > 500, colour
