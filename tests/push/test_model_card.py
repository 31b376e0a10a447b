"""What the card says is what the run's files hold, and its code gives the score that training read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from reward_recipes.pairs.tokens import encode_texts, load_tokenizer
from reward_recipes.push.card import write_card
from reward_recipes.score.model import NEW_HEAD, fit_to_tokenizer, load_classifier

REPO = "alice/my-rm"
RECIPE = {
    "model_name_or_path": "openai-community/gpt2",
    "dataset_name": "Anthropic/hh-rlhf",
    "learning_rate": 1e-5,
    "validation_fraction": 0.1,
}
CONFIG = {
    "architectures": ["GPT2ForSequenceClassification"],
    "transformers_version": "5.0.0",
    "reward_recipes": {"max_length": 1024, "overlong": "drop"},
}
AUDIT = {
    "train": {"pairs_read": 12345, "pairs_used": 12000, "longer_chosen": 0.531, "tokens_mean": 0.6, "new_measure": 3},
    "validation": {"pairs_used": 1200, "first_turn_in_train": 0},
    "test": {"pairs_read": 800, "pairs_used": 790, "longer_chosen": None},
}
SUMMARY = {
    "evaluations": 4,
    "best_step": 3000,
    "best_accuracy": 0.66,
    "best_loss_step": 2000,
    "best_loss": 0.61,
    "final_step": 4000,
    "final_accuracy": 0.64,
    "final_gap": 0.123,
    "overfitting_began": 3500,
}
TEST = {"test_accuracy": 0.6575, "test_loss": 0.6123, "test_pairs": 790, "test_margin": 0.4, "test_split": "test"}
INTERVAL = {"pairs": 700, "accuracy": 0.654, "accuracy_ci95": [0.62, 0.69]}
EVALUATION = INTERVAL | {
    "dataset": "other/pairs",
    "split": "test",
    "brier": 0.21,
    "ece": 0.034,
    "length_baseline_accuracy": 0.55,
    "length_correlation": 0.31,
    "accuracy_equal_length": None,
    "pairs_equal_length": 0,
    "subsets": {"harmless|base": INTERVAL},
    "categories": {},
}
ALL = {
    "recipe.yaml": RECIPE,
    "config.json": CONFIG,
    "data_audit.json": AUDIT,
    "run_summary.json": SUMMARY,
    "test_metrics.json": TEST,
    "evaluation.json": EVALUATION,
    "training_progress.png": None,
    "evaluation.png": None,
}


def card(
    folder: Path, base: str | None = "openai-community/gpt2", data: str | None = "Anthropic/hh-rlhf", **files: Any
) -> ModelCard:
    """The card of a run that holds `files`, by name."""
    for name, content in files.items():
        text = yaml.safe_dump(content) if name.endswith(".yaml") else json.dumps(content)
        (folder / name).write_text(text)
    write_card(folder, REPO, base, data)
    return ModelCard.load(folder / "README.md")


def row(text: str, label: str) -> list[str]:
    """The cells of the table row that begins with a label."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")[1:]]


def test_metadata_are_what_the_hub_reads(tmp_path: Path) -> None:
    data = card(tmp_path, **ALL).data.to_dict()
    assert data["base_model"] == "openai-community/gpt2" and data["datasets"] == ["Anthropic/hh-rlhf"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-classification")
    assert data["tags"] == ["reward-model", "trl", "reward-recipes", "rlhf"] and "license" not in data
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "my-rm" and result["metrics"][0]["value"] == 0.6575
    assert result["dataset"] == {"name": "Anthropic/hh-rlhf", "type": "Anthropic/hh-rlhf", "split": "test"}


def test_without_test_figures_the_evaluation_is_indexed(tmp_path: Path) -> None:
    (result,) = card(tmp_path, **{k: v for k, v in ALL.items() if k != "test_metrics.json"}).data.eval_results
    assert (result.metric_value, result.dataset_type, result.dataset_split) == (0.654, "other/pairs", "test")


def test_every_figure_stands_in_the_card(tmp_path: Path) -> None:
    text = card(tmp_path, **ALL).text
    assert row(text, "accuracy, a tie half right") == ["65.75%", "65.40%"]
    assert row(text, "its 95% interval (bootstrap by first turn)") == ["not measured", "62.00% to 69.00%"]
    assert row(text, "pairs") == ["790", "700"] and row(text, "Brier score") == ["not measured", "0.2100"]
    assert row(text, "mean margin, chosen minus rejected") == ["0.4000", "not measured"]
    assert row(text, "harmless\\|base") == ["65.40%", "62.00% to 69.00%", "700"]
    assert row(text, "accuracy of always preferring the longer reply") == ["55.00%"]
    assert row(text, "pairs read") == ["12,345", "-", "800"]
    assert row(text, "chosen text is the longer one, of pairs of unequal length") == ["53.1%", "-", "-"]
    assert row(text, "tokens of a text, mean") == ["1", "-", "-"] and row(text, "new_measure") == ["3", "-", "-"]
    assert "step 3,000 of 4,000" in text and "accuracy, 66.00%" in text and "overfitting began at step 3,500" in text
    assert "ranks **65.75%** of 790 pairs" in text and "learning_rate: 1.0e-05" in text
    assert "up to 1,024 tokens" in text and "optimistic" not in text and "ties" not in text
    assert "transformers 5.0.0" in text


def test_pictures_and_links_lead_to_files_that_are_there(tmp_path: Path) -> None:
    text = card(tmp_path, **ALL).text
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == ["evaluation.png", "training_progress.png"]
    for name in ("evaluation.png", "training_progress.png"):
        (tmp_path / name).unlink()
    assert "![" not in card(tmp_path).text


def test_what_is_missing_was_not_measured(tmp_path: Path) -> None:
    made = card(tmp_path, None, None, **{"recipe.yaml": RECIPE | {"dataset_name": "pairs.jsonl"}})
    assert not {"base_model", "datasets", "model-index"} & set(made.data.to_dict())
    assert made.text.count("not measured") == 5  # results, length, elsewhere, data, course
    assert "`pairs.jsonl` (a local folder or file)" in made.text
    assert "None" not in made.text and "Traceback" not in made.text


@pytest.mark.parametrize(
    ("recipe", "audit", "optimistic"),
    [
        ({}, {"train": {}, "test": {}}, True),  # no validation: the test split chose
        ({"eval_splits": ["test"]}, AUDIT, True),
        ({"eval_splits": ["validation", "test"]}, AUDIT, False),
        ({"eval_strategy": "no"}, {"train": {}, "test": {}}, False),  # nothing chose
    ],
)
def test_a_test_split_that_chose_the_model_is_called_optimistic(
    recipe: dict[str, Any], audit: dict[str, Any], optimistic: bool, tmp_path: Path
) -> None:
    text = card(tmp_path, **ALL | {"recipe.yaml": RECIPE | recipe, "data_audit.json": audit}).text
    assert ("are optimistic" in text) == optimistic


def test_the_step_that_was_kept_is_named(tmp_path: Path) -> None:
    by_loss = card(tmp_path, **ALL | {"recipe.yaml": RECIPE | {"metric_for_best_model": "loss"}}).text
    assert "step 2,000 of 4,000" in by_loss and "loss, 0.6100" in by_loss
    last = card(tmp_path, **ALL | {"recipe.yaml": RECIPE | {"eval_strategy": "no"}}).text
    assert "the model of the last step" in last


def test_the_card_tells_what_a_run_was_made_with_and_cost(tmp_path: Path) -> None:
    cost = {"pairs": 64_000, "num_unique_tokens": 1_234_567, "seconds": 4321.25}
    made = {"versions": {"trl": "1.12.0", "torch": "2.11.0"}, "commit": "0123abc+", "device": "Some GPU", "cost": cost}
    text = card(tmp_path, **ALL | {"run_summary.json": SUMMARY | made | {"processes": 4}}).text
    used = "used 64,000 pairs, repeats included, of 1,234,567 unique tokens (device: Some GPU, 4 processes)."
    assert f"Training took 4,321 seconds and {used}" in text
    assert "Trained with trl 1.12.0, torch 2.11.0, at commit 0123abc+." in text and "Installed" not in text
    made |= {"commit": None, "cost": cost | {"seconds": None}}
    text = card(tmp_path, **ALL | {"run_summary.json": SUMMARY | made}).text
    assert f"Training {used.replace(', 4 processes', '')}" in text and "torch 2.11.0." in text
    assert "Installed when this card was written: reward-recipes" in card(tmp_path, **ALL).text


def blocks(text: str, folder: Path) -> list[str]:
    """The card's Python, with the folder for the repository's id."""
    return [code.replace(REPO, str(folder)) for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def saved(source: Path, folder: Path) -> Any:
    """A reward model and its tokenizer as training would save them; returns the tokenizer."""
    tokenizer = load_tokenizer(str(source))
    torch.manual_seed(0)
    model = load_classifier(str(source), may_lack=NEW_HEAD)
    fit_to_tokenizer(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def score(folder: Path, ids: list[int]) -> float:
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        return model(input_ids=torch.tensor([ids])).logits.item()


@pytest.mark.parametrize("source", ["gpt2_dir", "llama_dir"])
def test_the_card_s_code_reads_the_score_that_training_read(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = saved(request.getfixturevalue(source), tmp_path)
    (code,) = blocks(card(tmp_path, **{"recipe.yaml": RECIPE}).text, tmp_path)
    names = {"prompt": "\n\nHuman: How do I bake bread?\n\nAssistant:", "response": " Mix flour and water."}
    exec(code, names)
    (ids,) = encode_texts(tokenizer, [names["prompt"] + names["response"]])
    assert names["score"] == pytest.approx(score(tmp_path, ids), abs=1e-6)
    assert names["score"] != pytest.approx(score(tmp_path, ids[:-1]), abs=1e-4)  # EOS does matter


def test_the_card_s_code_for_messages_too(chat_dir: Path, tmp_path: Path) -> None:
    tokenizer = saved(chat_dir, tmp_path)
    code = blocks(card(tmp_path, **{"recipe.yaml": RECIPE}).text, tmp_path)
    messages = [{"role": "user", "content": "Can you help me?"}, {"role": "assistant", "content": "Yes, of course."}]
    names = {"messages": messages, "prompt": "", "response": "text"}
    exec("\n".join(code), names)
    (ids,) = encode_texts(tokenizer, [messages])
    assert names["score"] == pytest.approx(score(tmp_path, ids), abs=1e-6)
