"""One text, one score: in training, in the scorer, in transformers' pipeline and in PPO (so this needs TRL 1.12)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import hh_pairs, write_jsonl
from transformers import pipeline
from whole_runs import arguments, run

from reward_recipes.pairs import encode_splits, load_pairs
from reward_recipes.run import UserError
from reward_recipes.score import Scorer, load_scorer

ppo = pytest.importorskip(
    "reward_recipes.policy.ppo", reason="TRL 1.12 is the last release with PPO", exc_type=ImportError
)
pytestmark = pytest.mark.usefixtures("sketched")
TOLERANCE = 1e-4
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "c_attn"}


@pytest.fixture(scope="module", params=["plain", "lora"])
def trained(
    request: pytest.FixtureRequest, gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run's output folder and its data."""
    folder = tmp_path_factory.mktemp(request.param)
    write_jsonl(folder / "data" / "train.jsonl", hh_pairs(24))
    write_jsonl(folder / "data" / "test.jsonl", hh_pairs(6, start=100))
    options = {"max_length": 120, "learning_rate": 1e-2, "max_steps": 4, "validation_fraction": 0}
    options |= LORA if request.param == "lora" else {}
    run(*arguments(gpt2_dir, folder / "data", folder / "run", **options))
    return folder / "run", folder / "data"


def texts_of(data: Path) -> list[str]:
    return [
        line[side]
        for line in map(json.loads, (data / "test.jsonl").read_text().splitlines())
        for side in ("chosen", "rejected")
    ]


def ppo_scores(scorer: Scorer, texts: list[str]) -> list[float]:
    """TRL's reading of prompts padded on the left and replies padded on the right."""
    pad = scorer.tokenizer.pad_token_id
    ids = scorer.encode(texts)
    prompts, replies = [text[: 3 + place % 4] for place, text in enumerate(ids)], []
    replies = [text[len(prompt) :] for text, prompt in zip(ids, prompts, strict=True)]
    left, right = max(map(len, prompts)), max(map(len, replies))
    rows = [[pad] * (left - len(p)) + p + r + [pad] * (right - len(r)) for p, r in zip(prompts, replies, strict=True)]
    with torch.no_grad():
        return ppo.get_reward(scorer.model, torch.tensor(rows), pad, left)[1].tolist()


def test_all_ways_to_score_a_text_agree(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """The pipeline, PPO, the model saved again, and the adapter that was not merged."""
    output, data = trained
    texts, scorer = texts_of(data), load_scorer(str(output))
    scores = scorer.score(texts)
    assert np.std(scores) > 0.01
    assert ppo_scores(scorer, texts) == pytest.approx(scores, abs=TOLERANCE)
    classify = pipeline("text-classification", str(output), function_to_apply="none", device="cpu")
    eos = classify.tokenizer.eos_token
    for batch_size in (1, 4):
        piped = classify([text + eos for text in texts], batch_size=batch_size)
        assert [result["score"] for result in piped] == pytest.approx(scores, abs=TOLERANCE)
    scorer.model.save_pretrained(tmp_path)
    scorer.tokenizer.save_pretrained(tmp_path)
    adapter = output / "adapter"
    for folder, tolerance in ((tmp_path, 0), *([(adapter, TOLERANCE)] if adapter.is_dir() else [])):
        again = load_scorer(str(folder))
        assert (again.max_length, again.overlong) == (scorer.max_length, scorer.overlong) == (120, "drop")
        assert again.score(texts) == pytest.approx(scores, abs=tolerance)
    assert adapter.is_dir() == ("lora" in str(output))


def test_the_scorer_repeats_the_scores_of_training(trained: tuple[Path, Path]) -> None:
    output, data = trained
    scorer = load_scorer(str(output))
    encoded = encode_splits(load_pairs(str(data)), scorer.tokenizer, 120, "drop", [])
    scores = scorer.score_pairs(encoded["test"])
    found = [scores.mean(), scores.std(), (scores[:, 0] - scores[:, 1]).mean()]
    in_training = json.loads((output / "test_metrics.json").read_text())
    names = ("test_mean_reward", "test_std_reward", "test_margin")
    assert found == pytest.approx([in_training[name] for name in names], abs=TOLERANCE)


def test_ppo_refuses_a_model_that_it_would_read_otherwise(reward_dir: Path) -> None:
    scorer = load_scorer(str(reward_dir))
    prompts = [[5, 6, 7], [8, 9]]
    ppo.check_parity(scorer, prompts, reply_length=8)
    # A model whose head adds the position in the batch's row stands for one that heeds padding.
    head = scorer.model.score.forward
    scorer.model.score.forward = lambda hidden: head(hidden) + torch.arange(hidden.shape[1])[None, :, None]
    with pytest.raises(UserError, match="PPO to read the scores of training"):
        ppo.check_parity(scorer, prompts, reply_length=8)


def test_normalised_scores_have_the_stated_spread(reward_dir: Path) -> None:
    scorer = load_scorer(str(reward_dir))
    texts = ["Yes.", "No.", "How do I bake bread?", "Mix flour."]
    raw = np.array(scorer.score(texts))
    scorer.model.score = ppo.NormalisedScore(scorer.model.score, raw.mean(), raw.std())
    normalised = np.array(scorer.score(texts))
    assert normalised.mean() == pytest.approx(0, abs=1e-5) and normalised.std() == pytest.approx(1, abs=1e-5)
