"""A wheel holds all that a command needs: outside a clone, a recipe is listed, copied and trained by its name."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import hh_pairs, write_jsonl

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).resolve().parents[2]
NAME = "gpt2-small/hh-rlhf/one_epoch"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package from a wheel, as pip lays it out."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "recipes", "accelerate_configs"):
        shutil.copytree(
            ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", folder, folder / "source"], check=True)
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder / "installed")
    return folder / "installed"


def command(installed: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """What `reward-recipes WORDS` does in a folder."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = [sys.executable, "-m", "reward_recipes", *map(str, words)]
    return subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)


def test_recipes_are_listed_found_and_copied(installed: Path, tmp_path: Path) -> None:
    listed = command(installed, tmp_path, "recipes").stdout
    recipes = [path for path in ROOT.glob("recipes/*/**/*.yaml") if "reproduce" not in path.parts]
    for path in (*recipes, *ROOT.glob("accelerate_configs/*.yaml")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().partition("/")[2]
        assert f"  {name} " in listed and (installed / "reward_recipes" / path.relative_to(ROOT)).is_file()
    for name in ("demo", NAME, "single_gpu"):
        assert str(installed) in command(installed, tmp_path, "recipes", "--path", name).stdout
    assert command(installed, tmp_path, "recipes", "--copy", "demo", "mine").stdout == "mine/demo\n"
    assert (tmp_path / "mine/demo/make_demo.py").read_bytes() == (ROOT / "recipes/demo/make_demo.py").read_bytes()
    for words in (("--copy", "demo", "mine"), ("--path", "no/such"), ("--pat",)):
        done = command(installed, tmp_path, "recipes", *words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_recipe_trains_by_its_name(installed: Path, gpt2_dir: Path, tmp_path: Path) -> None:
    pairs, run = write_jsonl(tmp_path / "data/harmless-base/train.jsonl", hh_pairs(40)), tmp_path / "run"
    options = {"model_name_or_path": gpt2_dir, "dataset_name": tmp_path / "data", "dataset_data_dirs": "harmless-base"}
    options |= {"output_dir": run, "max_length": 128, "logging_steps": 1, "eval_steps": 1, "bf16": False}
    (tmp_path / NAME).mkdir(parents=True)  # as another run's output folder may be called
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = command(installed, tmp_path, "train", "--config", NAME, *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "run_summary.json").read_text())["commit"] is None  # not that of a clone
    assert yaml.safe_load((run / "recipe.yaml").read_text())["learning_rate"] == 3e-5  # the recipe's
    words = ["--model_name_or_path", run, "--dataset_name", pairs, "--output_dir", tmp_path / "report"]
    done = command(installed, tmp_path, "evaluate", *words)
    assert done.stdout.startswith("accuracy ") and (tmp_path / "report/evaluation.md").is_file(), done.stderr
    misnamed = command(installed, tmp_path, "train", "--config", "gpt2-small/two")
    assert misnamed.returncode == 2 and "`reward-recipes recipes` lists, found 'gpt2-small/two'" in misnamed.stderr
