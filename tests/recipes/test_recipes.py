"""Shipped recipes and configurations: each goes through the parser that reads it in earnest."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from reward_recipes.config import parse_recipe
from reward_recipes.policy.common import parse_policy_recipe

ROOT = Path(__file__).resolve().parents[2]
POLICY_RECIPES = {"ppo": "PPORecipeConfig", "rloo": "RLOORecipeConfig"}
EVERY_RECIPE = sorted(set(ROOT.glob("recipes/**/*.yaml")) - set(ROOT.glob("recipes/reproduce/*.yaml")))
POLICY_PATHS = [path for path in EVERY_RECIPE if path.stem in POLICY_RECIPES]
RECIPES = [path for path in EVERY_RECIPE if path.stem not in POLICY_RECIPES]
ACCELERATE = sorted(ROOT.glob("accelerate_configs/*.yaml"))


def test_the_globs_find_the_shipped_files() -> None:
    names = {str(path.relative_to(ROOT / "recipes")) for path in RECIPES}
    assert {"gpt2-small/hh-rlhf/findings.yaml", "gpt2-small/hh-rlhf/one_epoch.yaml", "demo/overfit.yaml"} <= names
    assert {path.stem for path in ACCELERATE} == {
        *("cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp", "deepspeed_zero2", "deepspeed_zero3"),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_parses_and_opens_with_its_launch_line(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    config, recipe = re.fullmatch(
        r"# (?:make train, or: )?accelerate launch --config_file (\S+) -m reward_recipes\.train --config (\S+)", first
    ).groups()
    assert (ROOT / config).is_file() and ROOT / recipe == path
    script, training, model, *_ = parse_recipe(["--config", str(path), "--bf16", "false"])
    assert training.output_dir == f"outputs/{path.parent.relative_to(ROOT / 'recipes')}/{path.stem}".replace(
        "outputs/demo/overfit", "outputs/demo/run"
    )
    assert script.dataset_name and model.model_name_or_path
    for decided in ("bf16", "gradient_checkpointing", "max_grad_norm"):
        assert decided in yaml.safe_load(path.read_text()), f"{path} leaves {decided} to TRL's default"


@pytest.mark.parametrize("path", POLICY_PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_policy_recipe_parses_and_names_a_reward_model_that_another_recipe_trains(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the recipe itself was run, its output folder would be refused
    name, reason = path.stem, "TRL 1.12 is the last release with PPO"
    module = pytest.importorskip(f"reward_recipes.policy.{name}", reason=reason, exc_type=ImportError)
    launch = f"-m reward_recipes.{name} --config {path.relative_to(ROOT)}"
    assert path.read_text().splitlines()[0].endswith(launch)
    words = ["--config", str(path), "--bf16", "false"]
    _, config, _, _ = parse_policy_recipe(getattr(module, POLICY_RECIPES[name]), module.LOG, words)
    assert config.output_dir == f"outputs/{path.parent.relative_to(ROOT / 'recipes')}/{name}"
    trained = {yaml.safe_load(recipe.read_text())["output_dir"] for recipe in RECIPES}
    assert config.reward_model_path in trained


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    launch_command_parser().parse_args(["--config_file", str(path), "-m", "reward_recipes.train"])


def test_findings_states_the_study() -> None:
    path = ROOT / "recipes/gpt2-small/hh-rlhf/findings.yaml"
    _, config, model, *_ = parse_recipe(["--config", str(path)])
    assert model.model_name_or_path == "openai-community/gpt2"
    stated = (config.num_train_epochs, config.per_device_train_batch_size, config.gradient_accumulation_steps)
    assert stated == (3, 4, 1)
    assert (config.learning_rate, config.weight_decay, config.max_length) == (1e-5, 0.01, 512)
    assert (config.warmup_steps, config.lr_scheduler_type) == (0.03, "cosine")
    assert (config.validation_fraction, config.overlong) == (0.1, "keep_end")
    assert (config.eval_steps, config.logging_steps, config.save_state_dict) == (500, 500, True)
    pairs = round(160_800 * (1 - config.validation_fraction))
    assert pairs // config.per_device_train_batch_size * config.num_train_epochs == 108_540
