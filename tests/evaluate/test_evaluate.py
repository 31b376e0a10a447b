"""The command from its arguments to its three files: which pairs count, what is compared, and how it says no."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REAL_DATA, hh_pairs, needs_real_data, save_reward_model, write_jsonl
from datasets import Dataset
from matplotlib.image import imread
from transformers import AutoModelForSequenceClassification

from reward_recipes.evaluate import __main__ as door
from reward_recipes.evaluate import evaluation as command
from reward_recipes.pairs import load_tokenizer
from reward_recipes.run import UserError, parse_arguments

Judge = Callable[[list[int]], float]
Evaluate = Callable[..., tuple[dict[str, Any], str]]
BLANK = {"chosen": "", "rejected": "a"}
WORDS = ["--model_name_or_path", "m", "--dataset_name", "d"]


class ToyScorer:
    """Scores token ids by a rule."""

    def __init__(self, folder: Path, judge: Judge, max_length: int, overlong: str = "drop") -> None:
        self.tokenizer = load_tokenizer(str(folder))
        self.judge, self.max_length, self.overlong = judge, max_length, overlong

    def score_pairs(self, pairs: Dataset) -> np.ndarray:
        return np.array([[self.judge(pair["chosen_ids"]), self.judge(pair["rejected_ids"])] for pair in pairs], float)


def shorter(ids: list[int]) -> float:
    """Right about every pair of `hh_pairs`."""
    return -float(len(ids))


def turned(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, gpt2_dir: Path, tmp_path: Path) -> Evaluate:
    """Evaluates a toy judge on rows, without the picture; returns the report and the page.

    The baseline `N` prefers the longer text and takes N tokens.
    """
    monkeypatch.setattr(command, "draw_report", lambda report, path: path.touch())

    def run(
        rows: list[dict[str, Any]], judge: Judge = shorter, length: int = 1000, overlong: str = "drop", **fields: Any
    ) -> tuple[dict[str, Any], str]:
        def load(name: str, dtype: str) -> ToyScorer:
            if name == "model":
                return ToyScorer(gpt2_dir, judge, length, overlong)
            return ToyScorer(gpt2_dir, lambda ids: float(len(ids)), int(name))

        monkeypatch.setattr(command, "load_scorer", load)
        write_jsonl(tmp_path / "data" / "test.jsonl", rows)
        usual = {"dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
        report = command.evaluate(command.EvaluationArguments(**{"model_name_or_path": "model"} | usual | fields))
        return report, (tmp_path / "out" / "evaluation.md").read_text()

    return run


def test_report_of_a_perfect_model(evaluate: Evaluate, tmp_path: Path) -> None:
    report, page = evaluate(hh_pairs(12))
    assert [report[name] for name in ("pairs", "pairs_read", "cut", "prompts", "accuracy")] == [12, 12, 0, 12, 1.0]
    assert (report["accuracy_ci95"], set(report["dropped"].values())) == ([1.0, 1.0], {0})
    assert report["length_baseline_accuracy"] == 0.0  # "It is 4." against "No idea, ask somebody else."
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    assert page.startswith("# Evaluation of `model`\n\n**Accuracy 100.0% (95% interval 100.0% to 100.0%) on 12 pairs;")
    assert "Only 12 different first turns" in page and "No pair is ranked wrong." in page


def test_swapped_sides_give_the_complement(evaluate: Evaluate) -> None:
    """Scores by a sum of ids modulo 3: right on some pairs, tied on others."""
    ours, theirs = (evaluate(rows, lambda ids: float(sum(ids) % 3))[0] for rows in (hh_pairs(30), turned(hh_pairs(30))))
    assert 0 < ours["ties"] == theirs["ties"] < 1
    assert theirs["accuracy"] == pytest.approx(1 - ours["accuracy"])


def test_dropped_pairs_are_counted_by_reason_and_rows_are_those_of_the_source(evaluate: Evaluate) -> None:
    wrong, right = *turned(hh_pairs(1)), *hh_pairs(1, start=1)
    long = {"chosen": "\n\nHuman: a\n\nAssistant: " + "b c " * 100, "rejected": "\n\nHuman: a\n\nAssistant: d"}
    report, page = evaluate([BLANK, {"chosen": "a b", "rejected": "a b"}, long, wrong, right], length=100)
    assert report["dropped"] == {"blank": 1, "identical": 1, "identical_after_cut": 0, "overlong": 1}
    assert (report["pairs_read"], report["pairs"], report["accuracy"]) == (5, 2, 0.5)
    assert [pair["row"] for pair in report["most_confidently_wrong"]] == [3]
    assert "- 3 of 5 pairs were not scored (1 blank, 1 identical, 1 overlong)." in page


def test_cut_pairs_are_scored_and_counted(evaluate: Evaluate) -> None:
    long = "\n\nHuman: " + "tell me more " * 20 + "\n\nAssistant:"
    rows = [{"chosen": f"{long} yes", "rejected": f"{long} no, no"}]
    report, _ = evaluate(rows, length=40, overlong="keep_end")
    assert (report["pairs"], report["cut"], report["overlong"], report["accuracy_ci95"]) == (1, 1, "keep_end", None)
    assert report["by_dialogue_length"][0]["low"] > 40  # the length before the cut


def test_a_column_or_folders_name_subsets(evaluate: Evaluate, tmp_path: Path) -> None:
    chat = ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med")
    pair = {"chosen": "Yes.", "rejected": "I would not know."}
    report, page = evaluate([{"prompt": f"{name}?", **pair, "subset": name} for name in (*chat, "hep-go")])
    assert set(report["subsets"]) == {*chat, "hep-go"} and list(report["categories"]) == ["Chat"]
    assert "| RewardBench Chat | 100.0% (" in page and "| `hep-go` | 100.0% | 1 pair |" in page
    for name, start in (("helpful", 0), ("harmless", 10)):
        write_jsonl(tmp_path / "data" / name / "test.jsonl", hh_pairs(5, start))
    report, _ = evaluate(hh_pairs(3), dataset_data_dirs=["helpful", "harmless"])
    assert {name: part["pairs"] for name, part in report["subsets"].items()} == {"harmless": 5, "helpful": 5}


def test_paired_test_on_the_pairs_that_both_models_score(evaluate: Evaluate) -> None:
    """The baseline is wrong on all of 20 pairs: p = 2 / 2^20. One is blank, and one too long for the baseline."""
    long = "\n\nHuman: " + "word " * 100 + "\n\nAssistant:"
    rows = [*hh_pairs(20), BLANK, {"chosen": f"{long} Yes.", "rejected": f"{long} No, no."}]
    report, page = evaluate(rows, baseline_model_name_or_path="100")
    test = report["paired_test"]
    assert (report["pairs"], test["pairs"], test["only_model"], test["only_baseline"]) == (21, 20, 1, 0)
    assert (test["accuracy"], test["baseline_accuracy"], test["accuracy_difference"]) == (1.0, 0.0, 1.0)
    assert (test["better"], test["worse"], test["mcnemar_p"]) == (20, 0, pytest.approx(2 / 2**20))
    assert "## Against `100`" in page and "a difference beyond chance" in page
    ours, theirs = (pd.DataFrame({"row": [row], "chosen": [1.0], "rejected": [0.0]}) for row in (0, 1))
    with pytest.raises(UserError, match="both models can score, found none"):
        command.compare(ours, theirs)


def test_a_single_file_is_one_split(evaluate: Evaluate, tmp_path: Path) -> None:
    single = str(write_jsonl(tmp_path / "pairs.jsonl", hh_pairs(4)))
    with pytest.raises(UserError, match=r"found \['train'\].*single file is one split"):
        evaluate(hh_pairs(2), dataset_name=single)
    report, page = evaluate(hh_pairs(2), dataset_name=single, dataset_test_split="train")
    assert report["pairs"] == 4 and "The split is called `train`" in page


@pytest.mark.parametrize(
    ("rows", "fields", "complaint"),
    [
        ([BLANK, {"chosen": "a", "rejected": "a"}], {}, r"all 2 dropped: {'blank': 1, 'identical': 1}"),
        (hh_pairs(7), {"baseline_model_name_or_path": "2"}, "all 7 dropped"),
        (hh_pairs(2), {"dataset_test_split": "dev"}, r"'dev', found \['test'\].*--dataset_test_split"),
        (hh_pairs(2), {"output_dir": __file__}, "output_dir: expected a folder, found"),
        (hh_pairs(2), {"baseline_model_name_or_path": "model"}, "another model than model"),
    ],
)
def test_mistakes_are_named(
    rows: list[dict[str, str]], fields: dict[str, str], complaint: str, evaluate: Evaluate
) -> None:
    with pytest.raises(UserError, match=complaint):
        evaluate(rows, **fields)


@pytest.mark.parametrize(
    ("side", "prompt", "reply"),
    [
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d e ", None, "d e"),
        ("\n\nHuman: a\n\nAssistant:", None, ""),
        (" plain text", None, "plain text"),
        ("He said:\n\nAssistant: b", "What did he say?", "He said:\n\nAssistant: b"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}], None, "b c"),
        ([{"role": "assistant", "content": "b c"}], "a", "b c"),
    ],
)
def test_last_reply(side: Any, prompt: str | None, reply: str) -> None:
    assert command.last_reply(side, prompt) == reply


def test_arguments_from_yaml_and_command_line(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("{model_name_or_path: m, dataset_name: d, dataset_data_dirs: one, output_dir: from yaml}")
    (found,) = parse_arguments([command.EvaluationArguments], ["--config", str(path), "--output_dir", "said"])
    assert (found.output_dir, found.dataset_data_dirs, found.dataset_test_split) == ("said", ["one"], "test")
    path.write_text("{model_name_or_path: 5, output_dir: o}")
    for words, complaint in (
        (WORDS, "required: --output_dir"),
        ([*WORDS, "--output_dir", "o", "--max_length", "5"], "unknown option: --max_length 5"),
        (["--config", str(path), *WORDS[2:]], "model_name_or_path: expected text, found 5"),
    ):
        with pytest.raises(UserError, match=complaint):
            parse_arguments([command.EvaluationArguments], words)


def test_a_real_model_gets_the_scores_of_plain_transformers(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reward_dir, rows = save_reward_model(gpt2_dir, tmp_path / "model"), hh_pairs(20)
    write_jsonl(tmp_path / "data" / "test.jsonl", rows)
    words = ["evaluate", "--model_name_or_path", str(reward_dir), "--dataset_name", str(tmp_path / "data")]
    monkeypatch.setattr("sys.argv", [*words, "--output_dir", str(tmp_path / "out")])
    door.main()
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir).eval()
    tokenizer = load_tokenizer(str(reward_dir))

    def score(text: str) -> float:
        with torch.no_grad():
            return model(**tokenizer(text + tokenizer.eos_token, return_tensors="pt")).logits.item()

    margins = np.array([score(row["chosen"]) - score(row["rejected"]) for row in rows])
    assert report["accuracy"] == np.mean(margins > 0)
    assert report["mean_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert capsys.readouterr().out.startswith(f"accuracy {report['accuracy']:.1%} (95% interval ")
    assert imread(tmp_path / "out" / "evaluation.png").shape[0] > 900


@needs_real_data
def test_real_pairs(evaluate: Evaluate) -> None:
    """All test pairs of HH: which side is longer decides, so the toy judge's accuracy is the baseline's complement."""
    folders = ["harmless-base", "helpful-base"]
    source = {"dataset_name": str(REAL_DATA / "hh-rlhf"), "dataset_data_dirs": folders}
    report, _ = evaluate(hh_pairs(1), length=100_000, **source)
    assert (report["pairs_read"], report["subsets"]["helpful-base"]["pairs"]) == (860, 430)
    assert report["length_correlation"] < -0.9
    assert report["accuracy"] == pytest.approx(1 - report["length_baseline_accuracy"], abs=0.05)
