"""The demo's policy, whose true quality is known: PPO and RLOO raise it, and PPO without a KL penalty overoptimises."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import rlhf
from make_demo import write_demo
from test_policy import both, needs_ppo
from whole_runs import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sketched")]
RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "demo"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `make train` was run, and the supervised policy trained."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_demo(rlhf.DEMO)
        run("--config", str(RECIPES / "overfit.yaml"), "--use_cpu", "true", "--disable_tqdm", "true")
        rlhf.imitate(rlhf.DEMO, rlhf.SUPERVISED, rlhf.STEPS)
    return folder


def train(name: str, recipe: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run a recipe as `make ppo` does, in the current folder; return the run's."""
    words = [name, "--config", str(RECIPES / f"{recipe}.yaml"), "--seed", str(seed), "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", ["rlhf.py", *words])
    rlhf.main()
    return rlhf.DEMO / recipe


@both
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_score_and_true_quality_of_held_out_replies_rise(
    name: str, seed: int, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By more than three standard errors each, over 100 prompts."""
    monkeypatch.chdir(demo)
    samples = pd.read_csv(train(name, name, seed, monkeypatch) / "samples.csv")
    for column in ("score", "true_quality"):
        gain = samples[f"{column}_after"] - samples[f"{column}_before"]
        assert len(gain) == 100 and gain.mean() > 3 * gain.sem()


@needs_ppo
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_without_a_kl_penalty_a_higher_score_buys_no_true_quality(
    seed: int, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the recipe with a penalty, by means over 100 held-out prompts; 0.5 is about two standard errors."""
    monkeypatch.chdir(demo)
    runs = [pd.read_csv(train("ppo", recipe, seed, monkeypatch) / "samples.csv") for recipe in ("ppo", "overoptimise")]
    kept, pushed = (run[["score_after", "true_quality_after"]].mean() for run in runs)
    assert pushed["score_after"] > kept["score_after"]
    assert pushed["true_quality_after"] < kept["true_quality_after"] + 0.5
