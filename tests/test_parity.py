"""One text, one score: in training, in the scorer, in transformers' pipeline, and in PPO where TRL has it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import hh_pairs, write_jsonl
from transformers import pipeline
from whole_runs import arguments, run

from reward_recipes.pairs import encode_splits, load_pairs
from reward_recipes.score import Scorer, load_scorer

try:
    from reward_recipes.policy import ppo
except ImportError:  # TRL 1.12 is the last release with PPO
    ppo = None
pytestmark = pytest.mark.usefixtures("sketched")
TOLERANCE = 1e-5
TEST = hh_pairs(6, start=100)
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "c_attn"}
KINDS = {
    "plain": {},
    "lora": LORA,
    "dora": LORA | {"use_dora": True},
    "4bit": LORA | {"load_in_4bit": True},
    "8bit": LORA | {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=KINDS)
def trained(
    request: pytest.FixtureRequest, gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run's output folder and its data."""
    folder = tmp_path_factory.mktemp(request.param)
    write_jsonl(folder / "data" / "train.jsonl", hh_pairs(24))
    write_jsonl(folder / "data" / "test.jsonl", TEST)
    options = {"max_length": 120, "learning_rate": 1e-2, "max_steps": 4, "validation_fraction": 0}
    if "bit" in request.param:
        pytest.importorskip("bitsandbytes", reason="quantised training needs bitsandbytes")
    run(*arguments(gpt2_dir, folder / "data", folder / "run", **options | KINDS[request.param]))
    return folder / "run", folder / "data"


def ppo_scores(scorer: Scorer, texts: list[str]) -> list[float]:
    """TRL's reading of prompts padded on the left and replies padded on the right."""
    pad = scorer.tokenizer.pad_token_id
    ids = scorer.encode(texts)
    prompts = [text[: min(3 + place % 4, len(text) - 1)] for place, text in enumerate(ids)]
    replies = [text[len(prompt) :] for text, prompt in zip(ids, prompts, strict=True)]
    left, right = max(map(len, prompts)), max(map(len, replies))
    rows = [[pad] * (left - len(p)) + p + r + [pad] * (right - len(r)) for p, r in zip(prompts, replies, strict=True)]
    with torch.no_grad():
        return ppo.get_reward(scorer.model, torch.tensor(rows), pad, left)[1].tolist()


def test_all_ways_to_score_a_text_agree(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """The pipeline, PPO, the model saved again, and the adapter that was not merged."""
    output, _ = trained
    texts, scorer = ["", *(text for pair in TEST for text in pair.values())], load_scorer(str(output))
    scores = scorer.score(texts)
    assert np.std(scores) > 0.01
    assert ppo is None or ppo_scores(scorer, texts) == pytest.approx(scores, abs=TOLERANCE)
    classify = pipeline("text-classification", str(output), device="cpu")
    for batch_size in (1, 4):
        piped = classify(texts, batch_size=batch_size)
        assert [result["score"] for result in piped] == pytest.approx(scores, abs=TOLERANCE)
    scorer.model.save_pretrained(tmp_path)
    scorer.tokenizer.save_pretrained(tmp_path)
    adapter = output / "adapter"
    for folder, tolerance in ((tmp_path, 0), *([(adapter, TOLERANCE)] if adapter.is_dir() else [])):
        again = load_scorer(str(folder))
        assert (again.max_length, again.overlong) == (scorer.max_length, scorer.overlong) == (120, "drop")
        assert again.score(texts) == pytest.approx(scores, abs=tolerance)
    assert adapter.is_dir() == ("plain" not in str(output))


def test_the_scorer_repeats_the_scores_of_training(trained: tuple[Path, Path]) -> None:
    output, data = trained
    scorer = load_scorer(str(output))
    encoded = encode_splits(load_pairs(str(data)), scorer.tokenizer, 120, "drop", [])
    scores = scorer.score_pairs(encoded["test"])
    found = [scores.mean(), scores.std(), (scores[:, 0] - scores[:, 1]).mean()]
    in_training = json.loads((output / "test_metrics.json").read_text())
    names = ("test_mean_reward", "test_std_reward", "test_margin")
    assert found == pytest.approx([in_training[name] for name in names], abs=TOLERANCE)
    table = pd.read_csv(output / "test_scores.csv")
    assert table[["chosen_score", "rejected_score"]].to_numpy() == pytest.approx(scores, abs=TOLERANCE)
    assert scorer.form == "text"
