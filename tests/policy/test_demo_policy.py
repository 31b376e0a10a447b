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
    """By more than four standard errors each, over 100 prompts."""
    monkeypatch.chdir(demo)
    samples = pd.read_csv(train(name, name, seed, monkeypatch) / "samples.csv")
    for column in ("score", "true_quality"):
        gain = samples[f"{column}_after"] - samples[f"{column}_before"]
        assert len(gain) == 100 and gain.mean() > 4 * gain.sem()


@needs_ppo
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_without_a_kl_penalty_the_score_rises_on_while_the_true_quality_falls(
    seed: int, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo)
    log = pd.read_csv(train("ppo", "overoptimise", seed, monkeypatch) / "ppo_progress.csv")
    log = log[log["sample_score"].notna()]
    best, end = log.loc[log["sample_true_quality"].idxmax()], log.iloc[-1]
    assert end["sample_score"] > best["sample_score"] + 1
    assert end["sample_true_quality"] < best["sample_true_quality"] - 0.5
