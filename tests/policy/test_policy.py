"""PPO and RLOO end to end on toys: what a run leaves and logs, how it fails in one line, and that a seed fixes it."""

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
from conftest import CHATML, hh_pairs, save_reward_model, write_jsonl
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel
from trl import ModelConfig

from reward_recipes import RewardFunction
from reward_recipes.pairs import load_tokenizer
from reward_recipes.policy import rloo
from reward_recipes.policy.common import load_policy, load_policy_tokenizer, parse_policy_recipe
from reward_recipes.policy.log import PolicyLogCallback
from reward_recipes.policy.samples import Samples
from reward_recipes.run import UserError

try:
    from reward_recipes.policy import ppo
except ImportError:
    ppo = None
needs_ppo = pytest.mark.skipif(ppo is None, reason="TRL 1.12 is the last release with PPO")
both = pytest.mark.parametrize("name", [pytest.param("ppo", marks=needs_ppo), "rloo"])

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
TWO_UPDATES = {
    "ppo": {"total_episodes": 8, "response_length": 12, "kl_coef": 0.01, "num_ppo_epochs": 2},
    "rloo": {"max_steps": 2, "max_completion_length": 12, "num_generations": 2, "beta": 0.01},
}
Run = Callable[..., Path]


def words_of(name: str, **options: object) -> list[str]:
    """The command line of `ppo` or `rloo` for two updates."""
    named = COMMON | TWO_UPDATES[name] | options
    return [text for option, value in named.items() for text in (f"--{option}", str(value))]


def start(name: str, **options: object) -> None:
    """Run `ppo` or `rloo` in this process, through the parser."""
    module, config = (ppo, ppo.PPORecipeConfig) if name == "ppo" else (rloo, rloo.RLOORecipeConfig)
    module.train(*parse_policy_recipe(config, module.LOG, words_of(name, **options)))


@pytest.fixture
def sources(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Options that name a policy, twelve prompts, and a reward model that reads as far as the policy writes."""
    folder = tmp_path_factory.mktemp("sources")
    reward = save_reward_model(gpt2_dir, folder / "reward", max_length=120, overlong="drop")
    data = write_jsonl(folder / "pairs.jsonl", hh_pairs(12))
    return {"model_name_or_path": gpt2_dir, "reward_model_path": reward, "dataset_name": data}


@pytest.fixture
def run(sources: dict[str, Path], tmp_path: Path) -> Run:
    """Starts a run on the toys and returns its folder."""

    def run_toys(name: str, folder: str = "run", **options: object) -> Path:
        start(name, **sources | {"output_dir": tmp_path / folder} | options)
        return tmp_path / folder

    return run_toys


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def differs(before: Path, after: Path) -> bool:
    """Whether two folders hold models of the same weights by name, and others by value."""
    old, new = (GPT2LMHeadModel.from_pretrained(folder).state_dict() for folder in (before, after))
    assert old.keys() == new.keys()
    return any((old[key] != new[key]).any() for key in old)


@both
def test_a_run_leaves_policy_log_picture_and_samples(name: str, run: Run, gpt2_dir: Path) -> None:
    folder = run(name)
    log = rows(folder / f"{name}_progress.csv")
    assert [row["step"] for row in log] == ["1", "2"]
    for row in log:
        assert float(row["score"]) and 1 <= float(row["response_length"]) <= 12 and 0 <= float(row["missing_eos"]) <= 1
    assert float(log[0]["kl"]) == pytest.approx(0, abs=1e-4) and float(log[1]["kl"]) != 0
    assert (folder / f"{name}_progress.png").stat().st_size > 10_000
    samples = rows(folder / "samples.csv")
    assert len(samples) == 3 and list(samples[0]) == ["prompt", "before", "score_before", "after", "score_after"]
    assert differs(gpt2_dir, folder) and (folder / "tokenizer.json").is_file()
    assert not list(folder.rglob("training_args.bin"))
    with pytest.raises(UserError, match="holds another run"):
        run(name)


@both
def test_an_adapter_is_trained_in_place_of_the_policy(name: str, run: Run) -> None:
    folder = run(name, use_peft=True, lora_r=4, lora_target_modules="c_attn")
    adapter = load_file(folder / "adapter_model.safetensors")
    assert any(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)  # they start from zero
    assert not (folder / "README.md").exists()


def become_a_folder(log: Path) -> None:
    log.unlink()
    log.mkdir()


def lose_the_end_of_a_row(log: Path) -> None:
    whole = ",".join("0" for _ in log.read_text().split(","))
    log.write_text(f"{log.read_text()}{whole}\n0,0.5,0.")


@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param("ppo", become_a_folder, marks=needs_ppo), ("rloo", lose_the_end_of_a_row)],
)
def test_a_damaged_log_costs_no_policy(
    name: str, damage: Callable[[Path], None], run: Run, gpt2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = PolicyLogCallback.on_train_begin

    def begin_and_damage(callback: PolicyLogCallback, *args: object, **kwargs: object) -> None:
        begin(callback, *args, **kwargs)
        damage(callback.log)

    monkeypatch.setattr(PolicyLogCallback, "on_train_begin", begin_and_damage)
    with pytest.warns(UserWarning, match=r"_progress\.csv could not be written or drawn, and training goes on"):
        folder = run(name, sample_prompts=0)
    assert differs(gpt2_dir, folder)


def test_samples_are_drawn_as_in_training_whatever_the_policy_prefers(
    gpt2_dir: Path, reward_dir: Path, tmp_path: Path
) -> None:
    """A trained policy is in training mode, and a chat policy's own configuration may cut the tail of its tokens."""
    policy = GPT2LMHeadModel.from_pretrained(gpt2_dir, resid_pdrop=0.5)
    tokenizer = load_policy_tokenizer(ModelConfig(model_name_or_path=str(gpt2_dir)))
    texts = ["Why?", "How do I bake bread?"]
    asked = {"prompt": texts, "input_ids": tokenizer(texts)["input_ids"]}
    samples = Samples(asked, tokenizer, RewardFunction(str(reward_dir)), temperature=1.0, max_new_tokens=8, seed=3)
    samples.take(policy, "before")
    policy.train()
    policy.generation_config.top_p, policy.generation_config.repetition_penalty = 0.01, 1.5
    samples.take(policy, "after")
    samples.write(tmp_path)
    written = rows(tmp_path / "samples.csv")
    assert [row["prompt"] for row in written] == texts
    assert all(row["before"] == row["after"] and row["score_before"] == row["score_after"] for row in written)


PPO_RUN = {"total_episodes": 4, "num_mini_batches": 2, "learning_rate": 1e-2}
LORA_RUN = {"max_steps": 1, "use_peft": True, "lora_target_modules": "c_attn"}


@pytest.mark.parametrize(
    ("kind", "file", "options"),
    [
        pytest.param("ppo", "model.safetensors", PPO_RUN, marks=needs_ppo),
        ("rloo", "adapter_model.safetensors", LORA_RUN),
    ],
)
def test_a_seed_fixes_a_run(kind: str, file: str, options: dict[str, object], run: Run) -> None:
    """The state of numpy and torch is another one at the start of each run here."""
    found = []
    for seed in range(2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        folder = run(kind, str(seed), sample_prompts=0, **options)
        found.append(load_file(folder / file))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


@needs_ppo
def test_reply_lengths_are_those_that_the_reward_model_saw(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reads the score at `sequence_lengths`, so a reply ends there, whatever was generated after it."""
    from trl.experimental.ppo import ppo_trainer

    calls, original = [], ppo_trainer.get_reward

    def recorded(model: torch.nn.Module, ids: torch.Tensor, pad: int, width: int) -> tuple[torch.Tensor, ...]:
        result = original(model, ids, pad, width)
        calls.append((result[2] - width + 1).float().mean().item())
        return result

    monkeypatch.setattr(ppo_trainer, "get_reward", recorded)
    log = rows(run("ppo", total_episodes=16) / "ppo_progress.csv")
    asked_for_rewards = calls[1::2]  # every second time; before it TRL asks the value model
    assert [float(row["response_length"]) for row in log] == pytest.approx(asked_for_rewards)


@needs_ppo
def test_two_processes_train_one_policy(sources: dict[str, Path], gpt2_dir: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    words = words_of("ppo", **sources, output_dir=tmp_path, per_device_train_batch_size=2)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "reward_recipes.ppo", *words], check=True, timeout=300, env=environment)
    assert [row["step"] for row in rows(tmp_path / "ppo_progress.csv")] == ["1", "2"]
    assert differs(gpt2_dir, tmp_path)


@needs_ppo
def test_normalised_rewards_take_the_spread_of_the_test(tmp_path: Path) -> None:
    (tmp_path / "test_metrics.json").write_text(json.dumps({"test_mean_reward": 0.5, "test_std_reward": 2.0}))
    assert ppo.score_spread(str(tmp_path)) == (0.5, 2.0)


@needs_ppo
def test_ppo_refuses_another_tokenizer_and_rloo_takes_it(run: Run, llama_dir: Path) -> None:
    with pytest.raises(UserError, match=r"same tokenizer.*reward_recipes\.rloo"):
        run("ppo", model_name_or_path=llama_dir)
    assert len(rows(run("rloo", model_name_or_path=llama_dir, max_steps=1) / "rloo_progress.csv")) == 1


@needs_ppo
def test_ppo_refuses_a_template_that_opens_a_reply_in_another_way(chat_dir: Path) -> None:
    tokenizer = load_tokenizer(str(chat_dir))
    turn = [{"role": "user", "content": "Why?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    ppo.check_rendering(tokenizer, {"prompt": [turn], "input_ids": [ids]})
    tokenizer.chat_template = CHATML.replace("message['role'] + '\\n'", "message['role'] + '\\n<think>'")
    with pytest.raises(UserError, match=r"template that opens a reply as it writes one, found .*<think>"):
        ppo.check_rendering(tokenizer, {"prompt": [turn], "input_ids": [ids]})


MISTAKES = [
    ("ppo", {"reward_model_path": ""}, "reward_model_path: expected"),
    ("ppo", {"model_name_or_path": "/nowhere"}, "nowhere"),
    ("ppo", {"max_prompt_length": 0}, "max_prompt_length: expected 1 or more"),
    ("ppo", {"sampel_prompts": 3}, "unknown option"),
    ("ppo", {"num_sample_generations": 4}, "sample_prompts instead"),
    ("ppo", {"per_device_train_batch_size": 13}, "prompts for a batch of 13, found 12"),
    ("ppo", {"normalise_rewards": True}, r"normalise_rewards: expected test_metrics\.json"),
    ("ppo", {"response_length": 104}, r"expected at most 120 tokens, the reward model's max_length"),
    ("rloo", {"max_completion_length": 110}, r"expected at most 128 tokens, the policy's positions"),
]


@pytest.mark.parametrize(("name", "options", "complaint"), MISTAKES)
def test_mistakes_are_named(name: str, options: dict[str, object], complaint: str, run: Run, tmp_path: Path) -> None:
    if name == "ppo" and ppo is None:
        pytest.skip("TRL 1.12 is the last release with PPO")
    with pytest.raises(UserError, match=complaint):
        run(name, **options)
    assert not list(tmp_path.glob("run/*"))


@both
def test_a_reward_model_is_no_policy(name: str, run: Run, reward_dir: Path) -> None:
    with pytest.raises(UserError, match="expected a language model as policy"):
        run(name, model_name_or_path=reward_dir)


@needs_ppo
def test_ppo_names_overlong_prompts_before_it_scores_them(run: Run, tmp_path: Path) -> None:
    def prompt_of(tokens: int) -> Path:
        return write_jsonl(tmp_path / f"{tokens}.jsonl", [{"prompt": f"{row}" * tokens} for row in range(4)])

    with pytest.raises(UserError, match=r"expected at most 1\d\d tokens.*up to 212; lower max_prompt_length"):
        run("ppo", dataset_name=prompt_of(200))
    run("ppo", dataset_name=prompt_of(116), response_length=4, total_episodes=4, sample_prompts=0)


def test_a_broken_policy_is_named(gpt2_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(gpt2_dir, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"no weights")
    named = ModelConfig(model_name_or_path=str(broken))
    with pytest.raises(UserError, match=f"tokenizer of {broken}: "):
        load_policy_tokenizer(named)
    with pytest.raises(UserError, match=f"policy {broken}: "):
        load_policy(named)


@needs_ppo
def test_a_newer_trl_is_told_what_ppo_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    with pytest.raises(ImportError, match=r"TRL 1\.12.*reward-recipes\[ppo\]"):
        importlib.reload(ppo)
    monkeypatch.undo()
    importlib.reload(ppo)
