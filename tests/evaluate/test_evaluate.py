"""The command from its arguments to the three files, with toy judges and with a real tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import REAL_DATA, hh_pairs, needs_real_data, save_reward_model, write_jsonl
from datasets import Dataset
from matplotlib.image import imread
from transformers import AutoModelForSequenceClassification

from reward_recipes.evaluate import __main__ as door
from reward_recipes.evaluate import evaluation as command
from reward_recipes.evaluate.evaluation import EvaluationArguments, compare, evaluate, last_reply
from reward_recipes.pairs.tokens import load_tokenizer
from reward_recipes.run.arguments import parse_arguments
from reward_recipes.run.errors import UserError

Judge = Callable[[list[int]], float]


class ToyScorer:
    """Scores token ids by a rule."""

    def __init__(self, folder: Path, judge: Judge, max_length: int, overlong: str) -> None:
        self.tokenizer = load_tokenizer(str(folder))
        self.judge, self.max_length, self.overlong = judge, max_length, overlong

    def score_pairs(self, pairs: Dataset) -> np.ndarray:
        return np.array([[self.judge(pair["chosen_ids"]), self.judge(pair["rejected_ids"])] for pair in pairs], float)


def shorter(ids: list[int]) -> float:
    """Right about every pair of `hh_pairs`."""
    return -float(len(ids))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, gpt2_dir: Path) -> Callable[..., None]:
    """Make `evaluate` load toy judges: a model's name is looked up among the keywords."""

    def install(max_length: int = 1000, overlong: str = "drop", **judges: Judge) -> None:
        def load(name: str, dtype: str = "float32") -> ToyScorer:
            return ToyScorer(gpt2_dir, judges[name], max_length, overlong)

        monkeypatch.setattr(command, "load_scorer", load)

    return install


def run(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    write_jsonl(tmp_path / "data" / "test.jsonl", rows)
    usual = {"model_name_or_path": "model", "dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    return evaluate(EvaluationArguments(**usual | fields))


def test_report_of_a_perfect_model(tmp_path: Path, use: Callable[..., None]) -> None:
    use(model=shorter)
    report = run(tmp_path, hh_pairs(12))
    assert (report["pairs"], report["accuracy"], report["accuracy_ci95"], report["prompts"]) == (
        12,
        1.0,
        [1.0, 1.0],
        12,
    )
    assert report["length_baseline_accuracy"] == 0.0  # "It is 4." against "No idea, ask somebody else."
    assert (report["pairs_read"], report["cut"], set(report["dropped"].values())) == (12, 0, {0})
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert page.startswith("# Evaluation of `model`\n\n**Accuracy 100.0% (95% interval 100.0% to 100.0%) on 12 pairs;")
    assert "Only 12 different first turns" in page and "No pair is ranked wrong." in page
    assert imread(tmp_path / "out" / "evaluation.png").shape[0] > 900


def test_swapped_sides_give_the_complement(tmp_path: Path, use: Callable[..., None]) -> None:
    """Scores by the last digit of the length: right on some pairs, tied on others."""
    use(model=lambda ids: float(sum(ids) % 3))
    rows = hh_pairs(30)
    swapped = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    ours, theirs = run(tmp_path / "a", rows), run(tmp_path / "b", swapped)
    assert 0 < ours["ties"] == theirs["ties"] < 1
    assert theirs["accuracy"] == pytest.approx(1 - ours["accuracy"])


def test_dropped_pairs_are_counted_by_reason_and_rows_are_those_of_the_source(
    tmp_path: Path, use: Callable[..., None]
) -> None:
    """Rows: blank, identical, overlong, wrong, right."""
    use(model=shorter, max_length=100)
    wrong, right = hh_pairs(2)
    wrong = {"chosen": wrong["rejected"], "rejected": wrong["chosen"]}
    long = {"chosen": "\n\nHuman: a\n\nAssistant: " + "b c " * 100, "rejected": "\n\nHuman: a\n\nAssistant: d"}
    rows = [{"chosen": "", "rejected": "a"}, {"chosen": "a b", "rejected": "a b"}, long, wrong, right]
    report = run(tmp_path, rows)
    assert report["dropped"] == {"blank": 1, "identical": 1, "identical_after_cut": 0, "overlong": 1}
    assert (report["pairs_read"], report["pairs"], report["accuracy"]) == (5, 2, 0.5)
    assert [pair["row"] for pair in report["most_confidently_wrong"]] == [3]
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert "- 3 of 5 pairs were not scored (1 blank, 1 identical, 1 overlong)." in page


def test_cut_pairs_are_scored_and_counted(tmp_path: Path, use: Callable[..., None]) -> None:
    use(model=shorter, max_length=40, overlong="keep_end")
    long = "\n\nHuman: " + "tell me more " * 20 + "\n\nAssistant:"
    report = run(tmp_path, [{"chosen": f"{long} yes", "rejected": f"{long} no, no"}])
    assert (report["pairs"], report["cut"], report["overlong"], report["accuracy_ci95"]) == (1, 1, "keep_end", None)
    assert report["by_dialogue_length"][0]["low"] > 40  # the length before the cut


def test_no_usable_pair(tmp_path: Path, use: Callable[..., None]) -> None:
    use(model=shorter)
    with pytest.raises(UserError, match=r"found all 2 dropped: {'blank': 1, 'identical': 1}"):
        run(tmp_path, [{"chosen": "", "rejected": "a"}, {"chosen": "a", "rejected": "a"}])


def test_a_collapsed_model_is_told(tmp_path: Path, use: Callable[..., None]) -> None:
    use(model=lambda ids: 1.25)
    with pytest.warns(UserWarning, match="collapsed"):
        report = run(tmp_path, hh_pairs(60))
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert (report["accuracy"], report["ties"], report["accuracy_ci95"]) == (0.5, 1.0, [0.5, 0.5])
    assert "the model has collapsed" in page and "no better than a coin" in page


def test_rewardbench_columns(tmp_path: Path, use: Callable[..., None]) -> None:
    use(model=shorter)
    chat = ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med")
    rows = [
        {"prompt": f"Question {i}?", "chosen": "Yes.", "rejected": "I would not know.", "subset": name}
        for i, name in enumerate((*chat, "hep-go"))
    ]
    rows[0] |= {"chosen": "I would not know.", "rejected": "Yes."}
    report = run(tmp_path, rows)
    assert set(report["subsets"]) == {*chat, "hep-go"}
    assert report["subsets"]["alpacaeval-easy"] == {"pairs": 1, "accuracy": 0.0, "accuracy_ci95": None}
    assert {name: part["accuracy"] for name, part in report["categories"].items()} == {"Chat": 0.8}
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| RewardBench Chat | 80.0% (" in page and "| `hep-go` | 100.0% | 1 pair |" in page


def test_folders_become_subsets(tmp_path: Path, use: Callable[..., None]) -> None:
    use(model=shorter)
    for name, start in (("helpful", 0), ("harmless", 10)):
        write_jsonl(tmp_path / "data" / name / "test.jsonl", hh_pairs(5, start))
    report = run(tmp_path, hh_pairs(3), dataset_data_dirs=["helpful", "harmless"])
    assert {name: part["pairs"] for name, part in report["subsets"].items()} == {"harmless": 5, "helpful": 5}


def test_paired_test_on_the_pairs_that_both_models_score(tmp_path: Path, use: Callable[..., None]) -> None:
    """The baseline is wrong on all of 20 pairs: p = 2 / 2^20. One more pair is blank, and none is missing."""
    use(model=shorter, other=lambda ids: float(len(ids)))
    report = run(tmp_path, [*hh_pairs(20), {"chosen": "", "rejected": "a"}], baseline_model_name_or_path="other")
    test = report["paired_test"]
    assert (test["baseline"], test["pairs"], test["only_model"], test["only_baseline"]) == ("other", 20, 0, 0)
    assert (test["accuracy"], test["baseline_accuracy"], test["accuracy_difference"]) == (1.0, 0.0, 1.0)
    assert (test["better"], test["worse"], test["mcnemar_p"]) == (20, 0, pytest.approx(2 / 2**20))
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert "## Against `other`" in page and "a difference beyond chance" in page


def test_pairs_that_one_model_cannot_score_are_left_out_of_the_paired_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2_dir: Path
) -> None:
    limits = {"model": 1000, "short": 40, "shortest": 2}
    monkeypatch.setattr(command, "load_scorer", lambda name, dtype: ToyScorer(gpt2_dir, shorter, limits[name], "drop"))
    brief = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No, no."} for i in range(6)]
    long = [{"prompt": "word " * 50, "chosen": "Yes.", "rejected": "No, no."}]
    report = run(tmp_path, brief + long, baseline_model_name_or_path="short")
    test = report["paired_test"]
    assert (report["pairs"], test["pairs"], test["only_model"], test["only_baseline"]) == (7, 6, 1, 0)
    with pytest.raises(UserError, match="all 7 dropped"):
        run(tmp_path, brief + long, baseline_model_name_or_path="shortest")


def test_models_without_a_pair_in_common() -> None:
    ours, theirs = (pd.DataFrame({"row": [row], "chosen": [1.0], "rejected": [0.0]}) for row in (0, 1))
    with pytest.raises(UserError, match="both models can score, found none"):
        compare(ours, theirs)


def test_a_split_that_is_not_there(tmp_path: Path, use: Callable[..., None]) -> None:
    use(model=shorter)
    with pytest.raises(UserError, match=r"expected a split 'dev', found \['test'\]; name one by --dataset_test_split"):
        run(tmp_path, hh_pairs(2), dataset_test_split="dev")
    single = write_jsonl(tmp_path / "pairs.jsonl", hh_pairs(4))
    with pytest.raises(UserError, match=r"found \['train'\] \(a single file is one split, train\)"):
        run(tmp_path, hh_pairs(2), dataset_name=str(single))
    report = run(tmp_path, hh_pairs(2), dataset_name=str(single), dataset_test_split="train")
    assert report["pairs"] == 4
    assert "The split is called `train`" in (tmp_path / "out" / "evaluation.md").read_text()


def test_an_output_dir_that_is_a_file(tmp_path: Path, use: Callable[..., None]) -> None:
    use(model=shorter)
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError, match="out"):
        run(tmp_path, hh_pairs(2))


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
    assert last_reply(side, prompt) == reply


def test_arguments_from_yaml_and_command_line(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        yaml.safe_dump(
            {"model_name_or_path": "m", "dataset_name": "d", "dataset_data_dirs": "one", "output_dir": "from yaml"}
        )
    )
    (arguments,) = parse_arguments([EvaluationArguments], ["--config", str(path), "--output_dir", "said"])
    assert (arguments.output_dir, arguments.dataset_data_dirs, arguments.dataset_test_split) == (
        "said",
        ["one"],
        "test",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model_name_or_path m --dataset_name d", "required: --output_dir"),
        ("--model_name_or_path m --dataset_name d --output_dir o --max_length 5", "unknown option: --max_length 5"),
        (
            "--model_name_or_path m --dataset_name d --output_dir o --baseline_model_name_or_path m",
            "another model than m",
        ),
    ],
)
def test_unusable_arguments(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments([EvaluationArguments], ["--model_name_or_path", "m", "--dataset_name", "d", *words.split()])


def test_yaml_values_of_another_type(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": 5, "dataset_name": "d", "output_dir": "o"}))
    with pytest.raises(UserError, match="model_name_or_path: expected text, found 5"):
        parse_arguments([EvaluationArguments], ["--config", str(path)])


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


@needs_real_data
def test_real_pairs(tmp_path: Path, use: Callable[..., None]) -> None:
    """All test pairs of HH: which side is longer decides, so the toy judge's accuracy is the baseline's complement."""
    use(model=shorter, max_length=100_000)
    folders = ["harmless-base", "helpful-base"]
    report = run(tmp_path, hh_pairs(1), dataset_name=str(REAL_DATA / "hh-rlhf"), dataset_data_dirs=folders)
    assert (report["pairs_read"], report["subsets"]["helpful-base"]["pairs"]) == (860, 430)
    assert report["length_correlation"] < -0.9
    assert report["accuracy"] == pytest.approx(1 - report["length_baseline_accuracy"], abs=0.05)
