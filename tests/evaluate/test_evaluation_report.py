"""The page says what its figures call for and nothing else; the picture shows right and wrong pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from test_evaluation import table

from reward_recipes.evaluate.figures import evaluation_figures
from reward_recipes.evaluate.picture import draw_report
from reward_recipes.evaluate.report import format_report, headline

ALWAYS = "The intervals speak of other prompts like these, not of another training run or other data."


def report(margins: Any, found: dict[str, Any] | None = None, **columns: Any) -> dict[str, Any]:
    """A report on a table of `test_evaluation`, with `found` in place of the usual settings."""
    usual = {"model": "m", "dataset": "d", "split": "test", "dtype": "float32", "max_length": 64, "overlong": "drop"}
    usual |= {"pairs_read": len(margins), "cut": 0, "dropped": {"blank": 0, "overlong": 0}}
    return evaluation_figures(table(list(margins), **columns)) | usual | (found or {})


def doubts(found: dict[str, Any]) -> list[str]:
    """The sentences under "What to doubt" on the page of a report."""
    page = format_report(found, "figures.png")
    return page.split("## What to doubt")[1].split("##")[0].strip().removeprefix("- ").split("\n- ")


def sound(count: int = 400) -> np.ndarray:
    """Margins of one size, three of four right, as sure as they should be: sigmoid(ln 3) = 3/4."""
    return np.log(3) * np.where(np.arange(count) % 4 == 0, -1, 1)


def test_nothing_is_doubted_without_cause() -> None:
    """Every other four pairs have the longer reply chosen, so that length says nothing of right and wrong."""
    longer = np.where(np.arange(400) // 4 % 2, 20, 10)
    assert doubts(report(sound(), chosen_characters=longer, rejected_characters=30 - longer)) == [ALWAYS]


@pytest.mark.parametrize(
    ("margins", "words"),
    [
        (3 * sound(), "The model is too sure of itself: margins divided by 3 fit these pairs best."),
        (sound() / 2, "The model is too timid: margins divided by 0.5 fit these pairs best."),
        (sound(40), "Only 40 different first turns: the intervals are rough, and too narrow."),
        (np.abs(sound(300)), "All pairs came out alike, so the interval has no width; up to 1.0% may still be"),
        (np.where(np.arange(400) % 10 == 0, 0, sound()), "10.0% of the pairs are ties, each counted half right."),
        (-sound(), "The loss is no lower than a coin's (0.6931): as probabilities the scores are useless."),
    ],
)
def test_doubts_from_margins(margins: np.ndarray, words: str) -> None:
    assert any(doubt.startswith(words) for doubt in doubts(report(margins)))


def test_doubts_from_data_and_length() -> None:
    found = doubts(report(sound(), {"cut": 3, "split": "train"}, chosen_characters=np.where(sound() > 0, 90, 10)))
    assert "3 pairs were scored without their beginning, which was too long." in found
    assert "The split is called `train`: were these pairs trained on, all figures flatter the model." in found
    assert "Always preferring the longer reply reaches 87.5%, which the interval does not exclude." in found
    assert any(
        doubt.startswith("The model leans towards longer replies: margin and length correlate") for doubt in found
    )


def test_subsets_far_apart_are_told_and_close_ones_are_not() -> None:
    apart = report(np.sort(sound()), subset=["low"] * 200 + ["high"] * 200)
    assert any("from 50.0% (" in doubt and "in `low` to 100.0% (" in doubt for doubt in doubts(apart))
    close = report(sound(), subset=["one"] * 200 + ["two"] * 200)
    assert not any("range of subsets" in doubt for doubt in doubts(close))


def test_page_and_headline() -> None:
    page = format_report(report(sound(), subset=["a|b"] * 400), "figures.png")
    assert headline(report(sound())).startswith("accuracy 75.0% (95% interval 7")
    assert "| `a\\|b` | 75.0% (" in page and "(figures.png)" in page
    assert "counted from 0, with their margins: 0 (-1.10), 4 (-1.10)," in page


def test_picture_shows_right_wrong_and_tied_pairs(tmp_path: Path) -> None:
    margins = np.random.default_rng(0).normal(0.5, 1, 300)
    margins[:20] = 0
    draw_report(report(margins, subset=["a", "b", "c"] * 100), tmp_path / "out.png")
    pixels = np.round(imread(tmp_path / "out.png")[..., :3] * 255).astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x80, 0x80, 0x80)):
        assert (pixels == colour).all(axis=-1).sum() > 500, colour
