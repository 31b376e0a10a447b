"""Several right and wrong answers: the published rules on rows worked by hand; the command from rows to its page."""

import json
from math import tanh
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
from conftest import save_reward_model, write_jsonl

from reward_recipes.evaluate import __main__ as door
from reward_recipes.evaluate import evaluation
from reward_recipes.evaluate.best_of_n import best_credit, best_of_n_figures, ties_credit
from reward_recipes.pairs import load_pairs
from reward_recipes.run import UserError
from reward_recipes.score import load_scorer


def line(scores: list[float], right: int = 1, subset: str = "Math", **values: Any) -> dict[str, Any]:
    return {"id": "7", "prompt": "p", "subset": subset, "right": right, "scores": scores, "lengths": scores} | values


def test_a_tie_for_the_best_counts_by_its_share_of_right_answers() -> None:
    assert best_credit([2.0, 1.0, 0.0, 1.0], 1) == 1 and best_credit([1.0, 1.0, 2.0, 0.0], 1) == 0
    assert best_credit([1.0, 1.0, 1.0, 0.0], 1) == pytest.approx(1 / 3)  # three tie, one of them right
    assert best_credit([1.0, 1.0, 1.0, 0.0], 2) == pytest.approx(2 / 3)


def test_a_question_of_ties_by_hand() -> None:
    """Gaps 0.5 and 0.6 over a spread of 0.4; then no spread and one gap below 0; then 0 / 0."""
    assert ties_credit([1.0, 0.5, 0.2], 1, [2.0, 1.6, 1.0], 2) == pytest.approx(1 + 0.01 * tanh(0.5 / 0.4 - 1))
    assert ties_credit([0.0, 1.0], 1, [3.0, 3.0, 0.0], 2) == pytest.approx(0.3 + 0.2 - 0.01)
    assert ties_credit([1.0, 1.0], 1, [1.0, 1.0, 1.0], 2) == 0
    # The spread of 2 is wider than the gap of 1 on `tied` and narrower than that of 3 on `ref`.
    assert ties_credit([4.0, 1.0], 1, [5.0, 3.0, 2.0], 2) == pytest.approx(0.6 + 0.01 * tanh(1 / 2 - 1))


def test_each_subset_weighs_the_same_and_each_prompt_is_drawn_whole() -> None:
    """Math: right, wrong and two that tie of four; Safety: right by length alone. One question of Ties, one alone."""
    rows = [line([3, 2, 1, 0], prompt="a"), line([0, 2, 1, 3], prompt="a"), line([2, 2, 1, 0], prompt="b")]
    rows += [line([0, 1], subset="Safety", lengths=[9, 1], prompt="c")]
    rows += [line([4, 1], subset="Ties", id="ref:1"), line([5, 3, 2], 2, subset="Ties", id="tied:1")]
    found = best_of_n_figures(pd.DataFrame([*rows, line([4, 1], subset="Ties", id="ref:2")]))
    ties = 0.6 + 0.01 * tanh(-0.5)
    subsets = found["subsets"]
    assert [subsets[name]["score"] for name in ("Math", "Safety", "Ties")] == pytest.approx([0.5, 0, ties])
    assert [part["rows"] for part in subsets.values()] == [3, 1, 2] and found["rows"] == 6
    assert found["score"] == pytest.approx((0.5 + ties) / 3)
    assert found["length_score"] == pytest.approx((0.5 + 1 + ties) / 3)
    assert subsets["Math"]["pairwise_accuracy"] == pytest.approx((1 + 0 + 2.5 / 3) / 3)
    assert subsets["Math"]["score_ci95"] == [0.5, 0.5]  # both prompts have a half, whichever is drawn
    assert subsets["Safety"]["score_ci95"] is None and found["score_ci95"][0] < found["score"] < found["score_ci95"][1]
    with pytest.raises(UserError, match="without a partner"):
        best_of_n_figures(pd.DataFrame(rows[-1:]))


def test_the_command_reads_lists_of_answers(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RM-Bench names its subsets `domain`; a row with a long answer is dropped; training says who reads such rows."""
    model = save_reward_model(gpt2_dir, tmp_path / "model", max_length=60, overlong="drop")
    rows = [
        {"prompt": f"Q{size}?", "chosen": [" Yes.", " Yes, so."], "rejected": [" No.", " N." * size], "domain": kind}
        for size, kind in ((1, "math"), (2, "chat"), (60, "chat"))
    ]
    write_jsonl(tmp_path / "data" / "test.jsonl", rows)
    asked = {"model_name_or_path": model, "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out"}
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["evaluate", *words, "--columns", '{"subset": "domain"}', "--revision", "v2"])
    scorer = load_scorer(str(model))
    load = Mock(return_value=scorer)
    monkeypatch.setattr(evaluation, "load_scorer", load)
    door.main()
    load.assert_called_once_with(str(model), dtype="float32", revision="v2")
    report = json.loads((tmp_path / "out" / "best_of_n.json").read_text())
    assert (report["rows_read"], report["dropped"], report["rows"]) == (3, 1, 2)
    for row in rows[:2]:
        scores = scorer.score([row["prompt"] + answer for answer in (*row["chosen"], *row["rejected"])])
        part = report["subsets"][row["domain"]]
        assert part["score"] == (max(scores[:2]) > max(scores[2:])) and part["length_score"] == 1
    text = (tmp_path / "out" / "best_of_n.md").read_text()
    assert "1 of 3 rows do not count" in text and "The model: read as in its training" in text
    assert "| `math` |" in text and "| mean over subsets |" in text
    assert capsys.readouterr().out.startswith(f"score {report['score']:.1%}")
    with pytest.raises(UserError, match="found a list of answers"):
        load_pairs(str(tmp_path / "data"))
    write_jsonl(tmp_path / "data" / "test.jsonl", [rows[0], rows[0] | {"rejected": []}])
    with pytest.raises(UserError, match="row 1: expected answers in 'rejected'"):
        door.main()
