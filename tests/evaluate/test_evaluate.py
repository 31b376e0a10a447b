"""The command from its arguments to its three files: which pairs count, what is compared, and how it says no."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import hh_pairs, save_reward_model, write_jsonl
from datasets import Dataset
from matplotlib.image import imread
from transformers import pipeline

from reward_recipes.evaluate import __main__ as door
from reward_recipes.evaluate import evaluation as command
from reward_recipes.pairs import load_tokenizer
from reward_recipes.pairs.dialogue import last_reply
from reward_recipes.run import UserError

Evaluate = Callable[..., tuple[dict[str, Any], str]]
BLANK = {"chosen": "", "rejected": "a"}


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, gpt2_dir: Path, tmp_path: Path) -> Evaluate:
    """Evaluates a toy model on rows, without the picture, and returns report and page.

    The model prefers the shorter text, which is right about `hh_pairs`. A baseline prefers the longer one and takes as
    many tokens as its name says.
    """
    monkeypatch.setattr(command, "draw_report", lambda report, path: path.touch())
    tokenizer = load_tokenizer(str(gpt2_dir))

    def scorer(sign: float, max_length: int, overlong: str = "drop") -> SimpleNamespace:
        def score(pairs: Dataset) -> np.ndarray:
            return sign * np.array([[len(pair["chosen_ids"]), len(pair["rejected_ids"])] for pair in pairs])

        limits = {"max_length": max_length, "overlong": overlong}
        return SimpleNamespace(tokenizer=tokenizer, **limits, score_pairs=score, form=None, as_is=False, convention="")

    def run(rows: list[dict[str, Any]], *limits: Any, **fields: Any) -> tuple[dict[str, Any], str]:
        judge = scorer(-1.0, *limits or (1000,))
        monkeypatch.setattr(
            command, "load_scorer", lambda name, dtype, revision: judge if name == "model" else scorer(1.0, int(name))
        )
        write_jsonl(tmp_path / "data" / "test.jsonl", rows)
        usual = {"model_name_or_path": "model", "dataset_name": str(tmp_path / "data")}
        report = command.evaluate(command.EvaluationArguments(**usual | {"output_dir": str(tmp_path / "out")} | fields))
        return report, (tmp_path / "out" / "evaluation.md").read_text()

    return run


def test_report_of_a_perfect_model(evaluate: Evaluate, tmp_path: Path) -> None:
    report, page = evaluate([row | {"subset": f"{number % 2}"} for number, row in enumerate(hh_pairs(12))])
    assert [report[name] for name in ("pairs", "pairs_read", "cut", "prompts", "accuracy")] == [12, 12, 0, 12, 1.0]
    assert (report["accuracy_ci95"], set(report["dropped"].values())) == ([1.0, 1.0], {0})
    assert report["length_baseline_accuracy"] == 0.0  # "It is 4." against "No idea, ask somebody else."
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    assert page.startswith("# Evaluation of `model`\n\n**Accuracy 100.0% (95% interval 100.0% to 100.0%) on 12 pairs;")
    assert "Only 12 different first turns" in page and "No pair is ranked wrong." in page
    assert report["subsets"].keys() == {"0", "1"} and "| `1` | 100.0% (100.0% to 100.0%) | 6 pairs |" in page
    write_jsonl(tmp_path / "data" / "helpful" / "test.jsonl", hh_pairs(5))  # folders name subsets too
    report, _ = evaluate(hh_pairs(3), dataset_data_dirs="helpful")
    assert {name: part["pairs"] for name, part in report["subsets"].items()} == {"helpful": 5}


def test_dropped_and_cut_pairs_are_counted_and_rows_are_those_of_the_source(evaluate: Evaluate) -> None:
    (wrong, right), long = hh_pairs(2), "\n\nHuman: " + "tell me more " * 20 + "\n\nAssistant:"
    wrong = {"chosen": wrong["rejected"], "rejected": wrong["chosen"]}
    rows = [BLANK, {"chosen": "a b", "rejected": "a b"}, {"chosen": f"{long} no, no", "rejected": f"{long} yes"}]
    report, page = evaluate([*rows, wrong, right], 100)
    assert report["dropped"] == {"blank": 1, "identical": 1, "identical_after_cut": 0, "overlong": 1}
    assert (report["pairs_read"], report["pairs"], report["accuracy"]) == (5, 2, 0.5)
    assert [pair["row"] for pair in report["most_confidently_wrong"]] == [3]
    assert "- 3 of 5 pairs were not scored (1 blank, 1 identical, 1 overlong)." in page
    quoted = [line.split(maxsplit=1)[1] for line in page.split("Row 3, margin -")[1].splitlines() if line[:4] == "    "]
    assert quoted == ["Human: What is 0 and 0? Assistant:", "No idea, ask somebody else.", "It is 0."]
    report, _ = evaluate(rows, 40, "keep_end")
    assert (report["pairs"], report["cut"], report["overlong"], report["accuracy"]) == (1, 1, "keep_end", 0.0)
    assert report["by_dialogue_length"][0]["low"] > 100  # the length before the cut


def test_paired_test_on_the_pairs_that_both_models_score(evaluate: Evaluate) -> None:
    """The baseline is wrong on all of 20 pairs. One is blank, and one too long for the baseline."""
    long = "\n\nHuman: " + "word " * 100 + "\n\nAssistant:"
    rows = [*hh_pairs(20), BLANK, {"chosen": f"{long} Yes.", "rejected": f"{long} No, no."}]
    report, page = evaluate(rows, baseline_model_name_or_path="100")
    test = report["paired_test"]
    assert (report["pairs"], test["pairs"], test["only_model"], test["only_baseline"]) == (21, 20, 1, 0)
    assert (test["accuracy"], test["baseline_accuracy"], test["accuracy_difference"]) == (1.0, 0.0, 1.0)
    assert "## Against `100`" in page and "a difference beyond chance" in page


def test_mistakes_are_named(evaluate: Evaluate, tmp_path: Path) -> None:
    single = str(write_jsonl(tmp_path / "pairs.jsonl", hh_pairs(4)))
    for rows, fields, complaint in (
        ([BLANK, {"chosen": "a", "rejected": "a"}], {}, r"all 2 dropped: {'blank': 1, 'identical': 1}"),
        (hh_pairs(7), {"baseline_model_name_or_path": "2"}, "all 7 dropped"),
        (hh_pairs(2), {"dataset_test_split": "dev"}, r"'dev', found \['test'\].*--dataset_test_split"),
        (hh_pairs(2), {"dataset_name": single, "dataset_test_split": "test"}, "single file is one split, train"),
    ):
        with pytest.raises(UserError, match=complaint):
            evaluate(rows, **fields)
    report, _ = evaluate([], dataset_name=single)  # its only split needs no name
    assert (report["split"], report["pairs"]) == ("train", 4)


def test_last_reply() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    for side, prompt, reply in (
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d e ", None, "d e"),
        ("\n\nHuman: a\n\nAssistant:", None, ""),
        (" plain text", None, "plain text"),
        ("He said:\n\nAssistant: b", "What did he say?", "He said:\n\nAssistant: b"),
        ("Why? b", "Why?", "b"),
        (turns, None, "b c"),
    ):
        assert last_reply(prompt, side) == reply


def test_a_real_model_gets_the_scores_of_plain_transformers(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Called by a recipe and the command line."""
    rows, recipe, reward_dir = hh_pairs(20), tmp_path / "evaluate.yaml", save_reward_model(gpt2_dir, tmp_path / "model")
    write_jsonl(tmp_path / "one" / "test.jsonl", rows)
    recipe.write_text(f"{{model_name_or_path: {reward_dir}, dataset_name: {tmp_path}, dataset_data_dirs: one}}")
    monkeypatch.setattr("sys.argv", ["evaluate", "--config", str(recipe), "--output_dir", str(tmp_path / "out")])
    door.main()
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    judge = pipeline("text-classification", str(reward_dir))
    chosen, rejected = ([found["score"] for found in judge([row[side] for row in rows])] for side in rows[0])
    margins = np.array(chosen) - rejected
    assert report["accuracy"] == np.mean(margins > 0)
    assert report["mean_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert capsys.readouterr().out.startswith(f"accuracy {report['accuracy']:.1%} (95% interval ")
    assert imread(tmp_path / "out" / "evaluation.png").shape[0] > 900
