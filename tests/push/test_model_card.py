"""What the card says is what the run's files hold, and its code gives the score that training read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import save_reward_model
from huggingface_hub import ModelCard
from toys import text_score
from transformers import AutoModelForSequenceClassification

from reward_recipes.pairs.tokens import encode_texts, load_tokenizer
from reward_recipes.push.card import write_card

REPO = "alice/my-rm"
RECIPE = {"model_name_or_path": "openai-community/gpt2", "dataset_name": "Anthropic/hh-rlhf", "learning_rate": 1e-5}
CONFIG = {
    "architectures": ["GPT2ForSequenceClassification"],
    "reward_recipes": {"max_length": 1024, "overlong": "drop"},
}
AUDIT = {
    "train": {"pairs_read": 12345, "longer_chosen": 0.531, "tokens_mean": 0.6, "new_measure": 3},
    "validation": {"pairs_used": 1200},
    "test": {"pairs_read": 800, "longer_chosen": None},
}
SUMMARY = {
    **{"best_step": 3000, "best_accuracy": 0.66, "best_loss_step": 2000, "best_loss": 0.61},
    **{"final_step": 4000, "final_accuracy": 0.64, "final_gap": 0.123, "overfitting_began": 3500, "kept_step": 3000},
    **{"commit": "0123abc+", "device": "Some GPU", "processes": 4, "versions": {"trl": "1.12.0", "torch": "2.11.0"}},
    "cost": {"pairs": 64_000, "num_unique_tokens": 1_234_567, "seconds": 4321.25},
}
TEST = {"test_accuracy": 0.6575, "test_loss": 0.6123, "test_pairs": 790, "test_margin": 0.4, "test_split": "test"}
INTERVAL = {"pairs": 700, "accuracy": 0.654, "accuracy_ci95": [0.62, 0.69]}
EVALUATION = INTERVAL | {
    **{"dataset": "other/pairs", "split": "test", "brier": 0.21, "ece": 0.034, "length_baseline_accuracy": 0.55},
    **{"length_correlation": 0.31, "accuracy_equal_length": None, "pairs_equal_length": 0},
    **{"subsets": {"harmless|base": INTERVAL}, "categories": {}},
}
LEAST = {"recipe.yaml": RECIPE, "config.json": CONFIG, "data_audit.json": AUDIT, "run_summary.json": SUMMARY}
PICTURES = {"training_progress.png": None, "evaluation.png": None}
ALL = {**LEAST, "test_metrics.json": TEST, "evaluation.json": EVALUATION, **PICTURES}


def card(folder: Path, on_hub: bool = True, **files: Any) -> ModelCard:
    """The card of a run that holds `files`, by name; model and data are on the Hub or local."""
    for name, content in files.items():
        (folder / name).write_text(yaml.safe_dump(content) if name.endswith(".yaml") else json.dumps(content))
    write_card(folder, REPO, *("openai-community/gpt2", "Anthropic/hh-rlhf") if on_hub else (None, None))
    return ModelCard.load(folder / "README.md")


def row(text: str, label: str) -> list[str]:
    """The cells of the table row that begins with a label."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")[1:]]


def test_every_figure_stands_in_the_card_and_what_the_hub_reads_in_its_head(tmp_path: Path) -> None:
    made = card(tmp_path, **ALL)
    text, data = made.text, made.data.to_dict()
    assert row(text, "accuracy, a tie half right") == ["65.75%", "65.40%"]
    assert row(text, "its 95% interval (bootstrap by first turn)") == ["-", "62.00% to 69.00%"]
    assert row(text, "pairs") == ["790", "700"] and row(text, "Brier score") == ["-", "0.2100"]
    assert row(text, "mean margin, chosen minus rejected") == ["0.4000", "-"]
    assert row(text, "harmless\\|base") == ["65.40%", "62.00% to 69.00%", "700"]
    assert row(text, "accuracy of always preferring the longer text, in tokens") == ["55.00%"]
    assert row(text, "pairs read") == ["12,345", "-", "800"] and row(text, "tokens of a text, mean") == ["1", "-", "-"]
    assert row(text, "chosen text is the longer one, of pairs of unequal length") == ["53.1%", "-", "-"]
    assert "step 3,000 of 4,000" in text and "accuracy, 66.00%" in text and "overfitting began at step 3,500" in text
    assert "ranks **65.75%** of 790 pairs" in text and "learning_rate: 1.0e-05" in text
    assert "up to 1,024 tokens" in text and "optimistic" not in text and "ties" not in text
    used = "used 64,000 pairs, repeats included, of 1,234,567 unique tokens (device: Some GPU, 4 processes)."
    assert f"Training took 4,321 seconds and {used}" in text
    assert "Trained with trl 1.12.0, torch 2.11.0, at commit 0123abc+." in text
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == ["evaluation.png", "training_progress.png"]
    assert data["base_model"] == "openai-community/gpt2" and data["datasets"] == ["Anthropic/hh-rlhf"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-classification")
    assert data["tags"] == ["reward-model", "trl", "reward-recipes", "rlhf"] and "license" not in data
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "my-rm" and result["metrics"][0]["value"] == 0.6575
    assert result["dataset"] == {"name": "Anthropic/hh-rlhf", "type": "Anthropic/hh-rlhf", "split": "test"}


def test_what_is_missing_was_not_measured(tmp_path: Path) -> None:
    """A run of a local file, without a test split, an evaluation, pictures, a commit or times."""
    summary = SUMMARY | {"commit": None, "processes": 1, "cost": SUMMARY["cost"] | {"seconds": None}}
    recipe = RECIPE | {"dataset_name": "pairs.jsonl", "eval_strategy": "no"}
    made = card(tmp_path, False, **LEAST | {"run_summary.json": summary, "recipe.yaml": recipe})
    assert not {"base_model", "datasets", "model-index"} & set(made.data.to_dict())
    assert made.text.count("not measured") == 4  # results, length, elsewhere, course
    assert "`pairs.jsonl` (a local folder or file)" in made.text and "the model of the last step" in made.text
    assert "Training used 64,000 pairs" in made.text and "(device: Some GPU)." in made.text
    assert "torch 2.11.0." in made.text and "None" not in made.text and "![" not in made.text
    (result,) = card(tmp_path, **{"evaluation.json": EVALUATION}).data.eval_results  # in place of test figures
    assert (result.metric_value, result.dataset_type, result.dataset_split) == (0.654, "other/pairs", "test")


def test_the_split_that_chose_the_model_is_called_optimistic_and_the_step_is_named(tmp_path: Path) -> None:
    no_validation = {"train": {}, "test": {}}
    for recipe, audit, optimistic in (
        ({}, no_validation, True),
        ({"eval_splits": ["test"]}, AUDIT, True),
        ({"eval_splits": ["validation", "test"]}, AUDIT, False),
        ({"eval_strategy": "no"}, no_validation, False),  # nothing chose
    ):
        text = card(tmp_path, **ALL | {"recipe.yaml": RECIPE | recipe, "data_audit.json": audit}).text
        assert ("are optimistic" in text) == optimistic
    by_loss = ALL | {"recipe.yaml": RECIPE | {"metric_for_best_model": "loss"}}
    text = card(tmp_path, **by_loss | {"run_summary.json": SUMMARY | {"kept_step": 2000}}).text
    assert "step 2,000 of 4,000" in text and "loss, 0.6100" in text
    assert "the best step, 2,000, could not be written" in card(tmp_path, **by_loss).text


@pytest.mark.parametrize("kind", ["gpt2", "llama", "chat"])
def test_the_card_s_code_reads_the_score_that_training_read(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    save_reward_model(request.getfixturevalue(f"{kind}_dir"), tmp_path, max_length=128, overlong="drop")
    text = card(tmp_path, **{name: content for name, content in LEAST.items() if name != "config.json"}).text
    code = [block.replace(REPO, str(tmp_path)) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    messages = [{"role": "user", "content": "Can you help me?"}, {"role": "assistant", "content": "Yes, of course."}]
    names = {"prompt": "\n\nHuman: How do I bake bread?\n\nAssistant:", "response": " Mix flour.", "messages": messages}
    exec("\n".join(code), names)
    tokenizer, whole = load_tokenizer(str(tmp_path)), names["prompt"] + names["response"]
    chat = kind == "chat"
    (ids,) = encode_texts(tokenizer, [messages if chat else whole])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert len(code) == 1 + chat and names["score"] == pytest.approx(text_score(model, ids), abs=1e-6)
    assert names["score"] != pytest.approx(text_score(model, ids[:-1]), abs=1e-4)  # EOS does matter
