"""A reward model and a policy on a toy whose true reward is known: how often the letter a occurs in a reply."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from test_policy import both, rows, start
from transformers import GPT2LMHeadModel
from trl import ModelConfig
from whole_runs import arguments, run

from reward_recipes.policy.common import load_policy_tokenizer

pytestmark = pytest.mark.slow
LETTERS = "abcdefghijklmnop"


def true_reward(text: str) -> int:
    """How often the letter a occurs."""
    return text.count("a")


def reply(rng: random.Random) -> str:
    """Up to ten letters, any share of them a."""
    share = rng.random()
    return "".join("a" if rng.random() < share else rng.choice(LETTERS[1:]) for _ in range(rng.randrange(11)))


def prompt(number: int) -> str:
    return f"\n\nHuman: What is {number}?\n\nAssistant:"


@pytest.fixture(scope="module")
def judge(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model trained on pairs of which the chosen reply holds more of the letter a."""
    folder, rng, pairs = tmp_path_factory.mktemp("judge"), random.Random(0), []
    while len(pairs) < 900:
        low, high = sorted((reply(rng), reply(rng)), key=true_reward)
        if true_reward(low) < true_reward(high):
            pairs.append({"chosen": prompt(len(pairs)) + high, "rejected": prompt(len(pairs)) + low})
    write_jsonl(folder / "data" / "train.jsonl", pairs[:800])
    write_jsonl(folder / "data" / "test.jsonl", pairs[800:])
    options = {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "logging_steps": 10, "eval_steps": 20}
    run(*arguments(gpt2_dir, folder / "data", folder / "run", **options, disable_dropout=True))
    assert json.loads((folder / "run" / "test_metrics.json").read_text())["test_accuracy"] > 0.8
    return folder / "run"


@pytest.fixture(scope="module")
def policy(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy fine-tuned to reply with eight random letters and EOS: the usual first stage, in short."""
    folder, rng = tmp_path_factory.mktemp("policy"), random.Random(1)
    model = GPT2LMHeadModel.from_pretrained(gpt2_dir)
    tokenizer = load_policy_tokenizer(ModelConfig(str(gpt2_dir)))
    tokenizer.padding_side = "right"
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        texts = [f"{prompt(rng.randrange(700))}{''.join(rng.choices(LETTERS, k=8))}<|endoftext|>" for _ in range(32)]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        ended = (batch["input_ids"] == tokenizer.eos_token_id).cumsum(1)
        model(**batch, labels=batch["input_ids"].masked_fill(ended > 1, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LENGTHS = {
    "ppo": {"total_episodes": 64 * 30, "kl_coef": 0.02, "num_mini_batches": 1},
    "rloo": {"max_steps": 60, "num_generations": 8, "beta": 0.02},
}


@both
@pytest.mark.parametrize("seed", [1, 2])
def test_training_raises_the_true_reward(name: str, seed: int, policy: Path, judge: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt(number)} for number in range(128)])
    batch = {"per_device_train_batch_size": 64, "sample_prompts": 64, "temperature": 1.0, "learning_rate": 1e-3}
    sources = {"model_name_or_path": policy, "reward_model_path": judge, "dataset_name": data}
    start(name, output_dir=tmp_path / "run", seed=seed, **sources, **batch, **LENGTHS[name])
    samples = rows(tmp_path / "run" / "samples.csv")
    before, after = (sum(true_reward(row[when]) for row in samples) / len(samples) for when in ("before", "after"))
    assert after > before + 1.5
