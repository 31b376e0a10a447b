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
POLICY_RECIPES = {"ppo": "ppo", "rloo": "rloo", "overoptimise": "ppo"}  # names of files, and what runs them
EVERY_RECIPE = sorted(set(ROOT.glob("recipes/**/*.yaml")) - set(ROOT.glob("recipes/reproduce/*.yaml")))
POLICY_PATHS = [path for path in EVERY_RECIPE if path.stem in POLICY_RECIPES]
RECIPES = [path for path in EVERY_RECIPE if path.stem not in POLICY_RECIPES]


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
    name, reason = POLICY_RECIPES[path.stem], "TRL 1.12 is the last release with PPO"
    module = pytest.importorskip(f"reward_recipes.policy.{name}", reason=reason, exc_type=ImportError)
    launch = rf"(-m reward_recipes\.|recipes/demo/rlhf\.py ){name} --config {path.relative_to(ROOT)}"
    assert re.search(f"{launch}$", path.read_text().splitlines()[0])
    words = ["--config", str(path), "--bf16", "false"]
    _, config, _, _ = parse_policy_recipe(getattr(module, f"{name.upper()}RecipeConfig"), module.LOG, words)
    assert config.output_dir == f"outputs/{path.parent.relative_to(ROOT / 'recipes')}/{path.stem}"
    trained = {yaml.safe_load(recipe.read_text())["output_dir"] for recipe in RECIPES}
    assert config.reward_model_path in trained


def test_accelerate_reads_its_configurations_and_all_recipes_are_found() -> None:
    assert len(RECIPES) == 8 and len(POLICY_PATHS) == 5
    paths = {path.stem: path for path in ROOT.glob("accelerate_configs/*.yaml")}
    several = {"multi_gpu", "multi_node", "fsdp", "deepspeed_zero2", "deepspeed_zero3"}
    assert paths.keys() == {"cpu", "single_gpu", *several}
    for path in paths.values():
        assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]
        launch_command_parser().parse_args(["--config_file", str(path), "-m", "reward_recipes.train"])


def test_findings_states_the_study() -> None:
    """160,800 pairs, a tenth held out, 4 a step: 36,180 steps an epoch, and 108,540 in three."""
    _, config, model, *_ = parse_recipe(["--config", str(ROOT / "recipes/gpt2-small/hh-rlhf/findings.yaml")])
    assert model.model_name_or_path == "openai-community/gpt2"
    study = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    study |= {"learning_rate": 1e-5, "weight_decay": 0.01, "max_length": 512, "warmup_steps": 0.03}
    study |= {"lr_scheduler_type": "cosine", "validation_fraction": 0.1, "overlong": "keep_end"}
    study |= {"eval_steps": 500, "logging_steps": 500, "save_state_dict": True}
    assert {name: getattr(config, name) for name in study} == study
    assert round(160_800 * (1 - config.validation_fraction)) // config.per_device_train_batch_size * 3 == 108_540
