"""PPO and RLOO end to end on toys: what they write, what they measure, what they refuse."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import hh_pairs, save_reward_model, write_jsonl
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel
from trl import ModelConfig

from reward_recipes import RewardFunction
from reward_recipes.policy import rloo
from reward_recipes.policy.common import load_policy, load_policy_tokenizer, parse_policy_recipe
from reward_recipes.policy.log import PolicyLogCallback
from reward_recipes.policy.samples import Samples
from reward_recipes.run.errors import UserError

try:
    from reward_recipes.policy import ppo
except ImportError:
    ppo = None
needs_ppo = pytest.mark.skipif(ppo is None, reason="TRL 1.12 is the last release with PPO")
both = pytest.mark.parametrize("name", [pytest.param("ppo", marks=needs_ppo), "rloo"])

MODULES = {"ppo": ppo, "rloo": rloo}
COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "sample_prompts": 3,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
PPO = {"total_episodes": 8, "response_length": 12, "kl_coef": 0.01, "num_ppo_epochs": 2}
RLOO = {"max_steps": 2, "max_completion_length": 12, "num_generations": 2, "beta": 0.01}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "pairs.jsonl", hh_pairs(12))


@pytest.fixture(scope="module")
def reward_dir(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that reads as far as the policy writes."""
    return save_reward_model(gpt2_dir, tmp_path_factory.mktemp("reward") / "gpt2", max_length=120, overlong="drop")


def start(name: str, policy: Path, reward: Path, data: Path, output: Path, **options: object) -> None:
    """Run `ppo` or `rloo` in this process, through the parser."""
    kind, defaults = (ppo.PPORecipeConfig, PPO) if name == "ppo" else (rloo.RLOORecipeConfig, RLOO)
    module = MODULES[name]
    named = COMMON | defaults | {"model_name_or_path": policy, "reward_model_path": reward, "dataset_name": data}
    named |= {"output_dir": output} | options
    words = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    module.train(*parse_policy_recipe(kind, module.LOG, words))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@both
def test_a_run_leaves_policy_log_picture_and_samples(
    name: str, gpt2_dir: Path, reward_dir: Path, data: Path, tmp_path: Path
) -> None:
    start(name, gpt2_dir, reward_dir, data, tmp_path / "run")
    log = rows(tmp_path / "run" / MODULES[name].LOG)
    assert [row["step"] for row in log] == ["1", "2"]
    for row in log:
        assert float(row["score"]) and 1 <= float(row["response_length"]) <= 12 and 0 <= float(row["missing_eos"]) <= 1
    assert float(log[0]["kl"]) == pytest.approx(0, abs=1e-4) and float(log[1]["kl"]) != 0
    assert (tmp_path / "run" / MODULES[name].LOG).with_suffix(".png").stat().st_size > 10_000
    samples = rows(tmp_path / "run" / "samples.csv")
    assert len(samples) == 3
    assert list(samples[0]) == ["prompt", "before", "score_before", "after", "score_after"]
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    with pytest.raises(UserError, match="holds another run"):
        start(name, gpt2_dir, reward_dir, data, tmp_path / "run")


def become_a_folder(log: Path) -> None:
    log.unlink()
    log.mkdir()


def lose_the_end_of_a_row(log: Path) -> None:
    whole = ",".join("0" for _ in log.read_text().split(","))
    log.write_text(f"{log.read_text()}{whole}\n0,0.5,0.")


@both
@pytest.mark.parametrize("damage", [become_a_folder, lose_the_end_of_a_row])
def test_a_damaged_log_costs_no_policy(
    name: str,
    damage: Callable[[Path], None],
    gpt2_dir: Path,
    reward_dir: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = PolicyLogCallback.on_train_begin

    def begin_and_damage(callback: PolicyLogCallback, *args: object, **kwargs: object) -> None:
        begin(callback, *args, **kwargs)
        damage(callback.log)

    monkeypatch.setattr(PolicyLogCallback, "on_train_begin", begin_and_damage)
    short = {"ppo": {"total_episodes": 4}, "rloo": {"max_steps": 1}}[name]
    with pytest.warns(UserWarning, match=r"_progress\.csv could not be written or drawn, and training goes on"):
        start(name, gpt2_dir, reward_dir, data, tmp_path / "run", sample_prompts=0, **short)
    before, after = (load_file(folder / "model.safetensors") for folder in (gpt2_dir, tmp_path / "run"))
    assert any((before[key] != after[key]).any() for key in before)


def test_samples_are_drawn_as_in_training_whatever_the_policy_prefers(
    gpt2_dir: Path, reward_dir: Path, tmp_path: Path
) -> None:
    """A trained policy is in training mode, and a chat policy's own configuration may cut the tail of its tokens."""
    policy = GPT2LMHeadModel.from_pretrained(gpt2_dir, resid_pdrop=0.5)
    tokenizer = load_policy_tokenizer(ModelConfig(model_name_or_path=str(gpt2_dir)))
    texts = ["Why?", "How do I bake bread?"]
    prompts = {"prompt": texts, "input_ids": tokenizer(texts)["input_ids"]}
    samples = Samples(prompts, tokenizer, RewardFunction(str(reward_dir)), temperature=1.0, max_new_tokens=8, seed=3)
    samples.take(policy, "before")
    policy.train()
    policy.generation_config.top_p = 0.01
    policy.generation_config.repetition_penalty = 1.5
    samples.take(policy, "after")
    samples.write(tmp_path)
    written = rows(tmp_path / "samples.csv")
    assert [row["prompt"] for row in written] == texts
    assert all(row["before"] == row["after"] and row["score_before"] == row["score_after"] for row in written)


@needs_ppo
def test_a_seed_fixes_a_ppo_run(gpt2_dir: Path, reward_dir: Path, data: Path, tmp_path: Path) -> None:
    """TRL shuffles mini-batches with numpy, whose state is another one at the start of each run here."""
    found = []
    for run in range(2):
        np.random.seed(run)
        options = {"total_episodes": 4, "num_mini_batches": 2, "learning_rate": 1e-2, "sample_prompts": 0}
        start("ppo", gpt2_dir, reward_dir, data, tmp_path / str(run), **options)
        found.append(load_file(tmp_path / str(run) / "model.safetensors"))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


@needs_ppo
def test_reply_lengths_are_those_that_the_reward_model_saw(
    gpt2_dir: Path, reward_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL reads the score at `sequence_lengths`, so a reply ends there, whatever was generated after it."""
    from trl.experimental.ppo import ppo_trainer

    calls, original = [], ppo_trainer.get_reward

    def recorded(model: torch.nn.Module, ids: torch.Tensor, pad: int, width: int) -> tuple[torch.Tensor, ...]:
        result = original(model, ids, pad, width)
        calls.append((result[2] - width + 1).float().mean().item())
        return result

    monkeypatch.setattr(ppo_trainer, "get_reward", recorded)
    start("ppo", gpt2_dir, reward_dir, data, tmp_path / "run", total_episodes=16)
    asked_for_rewards = calls[1::2]  # every second time; before it TRL asks the value model
    measured = [float(row["response_length"]) for row in rows(tmp_path / "run" / ppo.LOG)]
    assert measured == pytest.approx(asked_for_rewards)


@needs_ppo
def test_normalised_rewards_need_a_measured_spread(
    gpt2_dir: Path, reward_dir: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"normalise_rewards: expected test_metrics\.json"):
        ppo.score_spread(str(reward_dir))
    (tmp_path / "test_metrics.json").write_text(json.dumps({"test_mean_reward": 0.5, "test_std_reward": 2.0}))
    assert ppo.score_spread(str(tmp_path)) == (0.5, 2.0)


@needs_ppo
def test_ppo_refuses_another_tokenizer_and_rloo_takes_it(
    llama_dir: Path, reward_dir: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"same tokenizer.*reward_recipes\.rloo"):
        start("ppo", llama_dir, reward_dir, data, tmp_path / "ppo")
    start("rloo", llama_dir, reward_dir, data, tmp_path / "rloo", max_steps=1)
    assert len(rows(tmp_path / "rloo" / rloo.LOG)) == 1


@needs_ppo
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"reward_model_path": ""}, "reward_model_path: expected"),
        ({"model_name_or_path": "/nowhere"}, "nowhere"),
        ({"max_prompt_length": 0}, "max_prompt_length: expected 1 or more"),
        ({"sampel_prompts": 3}, "unknown option"),
        ({"num_sample_generations": 4}, "sample_prompts instead"),
        ({"per_device_train_batch_size": 13}, "prompts for a batch of 13, found 12"),
    ],
)
def test_mistakes_are_named(
    options: dict[str, object], complaint: str, gpt2_dir: Path, reward_dir: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        start("ppo", gpt2_dir, reward_dir, data, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@needs_ppo
def test_a_newer_trl_is_told_what_ppo_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    with pytest.raises(ImportError, match=r"TRL 1\.12.*reward-recipes\[ppo\]"):
        importlib.reload(ppo)
    monkeypatch.undo()
    importlib.reload(ppo)


@needs_ppo
def test_two_processes_train_one_policy(gpt2_dir: Path, reward_dir: Path, data: Path, tmp_path: Path) -> None:
    named = COMMON | PPO | {"model_name_or_path": gpt2_dir, "reward_model_path": reward_dir, "dataset_name": data}
    named |= {"output_dir": tmp_path / "run", "per_device_train_batch_size": 2}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    words = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "reward_recipes.ppo", *words], check=True, timeout=300, env=environment)
    assert [row["step"] for row in rows(tmp_path / "run" / ppo.LOG)] == ["1", "2"]
    before, after = (GPT2LMHeadModel.from_pretrained(folder).state_dict() for folder in (gpt2_dir, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


@pytest.mark.parametrize("name", [pytest.param("ppo", marks=needs_ppo), "rloo"])
def test_an_adapter_is_trained_in_place_of_the_policy(
    name: str, gpt2_dir: Path, reward_dir: Path, data: Path, tmp_path: Path
) -> None:
    start(name, gpt2_dir, reward_dir, data, tmp_path, use_peft=True, lora_r=4, lora_target_modules="c_attn")
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert any(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)  # they start from zero
    assert not (tmp_path / "README.md").exists()


@both
def test_a_reply_must_fit_the_policy(name: str, gpt2_dir: Path, reward_dir: Path, data: Path, tmp_path: Path) -> None:
    length = {"ppo": "response_length", "rloo": "max_completion_length"}[name]
    with pytest.raises(UserError, match=r"expected at most 1\d\d tokens, the (policy's positions|reward model's)"):
        start(name, gpt2_dir, reward_dir, data, tmp_path / "run", **{length: 110})
    with pytest.raises(UserError, match="expected a language model as policy"):
        start(name, reward_dir, reward_dir, data, tmp_path / "run")


@needs_ppo
def test_ppo_names_overlong_prompts_before_it_scores_them(gpt2_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    def prompt_of(tokens: int) -> Path:
        return write_jsonl(tmp_path / f"{tokens}.jsonl", [{"prompt": f"{row}" * tokens} for row in range(4)])

    with pytest.raises(UserError, match=r"expected at most 1\d\d tokens.*up to 212; lower max_prompt_length"):
        start("ppo", gpt2_dir, reward_dir, prompt_of(200), tmp_path / "long")
    fits = {"response_length": 4, "total_episodes": 4, "sample_prompts": 0}
    start("ppo", gpt2_dir, reward_dir, prompt_of(116), tmp_path / "fits", **fits)
    assert len(rows(tmp_path / "fits" / ppo.LOG)) == 1


def test_a_broken_policy_is_named(gpt2_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(gpt2_dir, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"no weights")
    named = ModelConfig(model_name_or_path=str(broken))
    with pytest.raises(UserError, match=f"tokenizer of {broken}: "):
        load_policy_tokenizer(named)
    with pytest.raises(UserError, match=f"policy {broken}: "):
        load_policy(named)
