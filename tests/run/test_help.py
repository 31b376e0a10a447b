"""`--help` is there at once, and its pages say what the live parsers say; `--help_all` leaves no option out."""

import re
import resource
import subprocess
import sys
from dataclasses import Field, fields
from inspect import get_annotations
from pathlib import Path

import pytest
from trl import ModelConfig, ScriptArguments, TrlParser

from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.evaluate.evaluation import EvaluationArguments
from reward_recipes.policy.common import PolicyArguments
from reward_recipes.policy.rloo import RLOORecipeConfig
from reward_recipes.run import parse_arguments
from reward_recipes.run.arguments import WITHOUT_USE
from reward_recipes.score.__main__ import ScoreArguments
from reward_recipes.shipped import PACKAGE, help_page

TRAIN = (ScriptArguments, RewardRecipeConfig, ModelConfig)
PAGES = {"train": TRAIN, "audit": TRAIN, "score": (ScoreArguments,), "evaluate": (EvaluationArguments,)}
PAGES["rloo"] = (ScriptArguments, RLOORecipeConfig, ModelConfig, PolicyArguments)
PAGES["ppo"] = (ScriptArguments, ModelConfig, PolicyArguments)  # and PPO's own, where TRL has it


def entries(module: str) -> dict[str, str]:
    """The page's options, each with its text on one line."""
    found = re.findall(r"^  --(\w+) (.+(?:\n {20}.+)*)", help_page(module), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found if name not in ("config", "help_all")}


def default(spec: Field) -> str:
    value = str(spec.default).lower() if isinstance(spec.default, bool) else spec.default
    return f" [{value}]" if isinstance(value, (str, int, float)) and value != "" else ""


@pytest.mark.parametrize("module", PAGES)
def test_a_page_says_what_the_parser_does(module: str) -> None:
    """A field of ours that is new or changed fails here, beside the text that its page needs."""
    types, shown, known = PAGES[module], entries(module), set()
    if module == "ppo":
        ppo = pytest.importorskip("reward_recipes.policy.ppo", reason="TRL 1.12", exc_type=ImportError)
        types = (*types, ppo.PPORecipeConfig)
    for kind in types:
        bases = [base for base in kind.__mro__ if base.__module__.startswith("reward_recipes")]
        own = {name for base in bases for name in get_annotations(base)}
        for spec in fields(kind):
            name = spec.name.removeprefix("model_") if spec.name == "model_revision" else spec.name
            known.add(name)
            if spec.name in own and (module != "audit" or name in shown):
                assert (name, shown.get(name)) == (name, spec.metadata["help"] + default(spec))
            elif name in shown and name != "lora_task_type":
                assert shown[name].endswith(default(spec))
    assert shown.keys() <= known


def test_help_is_short_and_there_before_torch_could_be(tmp_path: Path) -> None:
    commands = [[f"reward_recipes.{name}"] for name in (*PAGES, "push", "plot_training")]
    commands += [["reward_recipes", "recipes"], ["reward_recipes", "train"]]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for words in commands:
        command = [sys.executable, "-m", *words, "--help"]
        done = subprocess.run(command, env={"PYTHONPATH": str(PACKAGE.parent)}, cwd=tmp_path, capture_output=True)
        page = help_page(words[-1].removeprefix("reward_recipes."))
        assert (done.returncode, done.stdout.decode()) == (0, page), done.stderr
        assert page.count("\n") < 120 and max(map(len, page.splitlines())) <= 120
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < len(commands)  # seconds; importing torch alone takes more


def test_help_all_adds_what_the_page_lacks_and_has_an_effect(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for word in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stopped:
            parse_recipe([word])
        assert not stopped.value.code
        printed.append(capsys.readouterr().out)
    assert printed[0] == help_page("train") and printed[1].startswith(printed[0])
    listed = {*re.findall(r"--(\w+)", printed[1].removeprefix(printed[0])), *entries("train"), "help"}
    actions = TrlParser(TRAIN)._actions
    found = {action.dest for action in actions if {name[2:] for name in action.option_strings} & listed}
    dests = {action.dest for action in actions}
    assert dests - found == WITHOUT_USE & dests


@pytest.mark.parametrize("name", ["revision", "model_revision"])
def test_revision_has_one_name_in_all_commands(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{name}: v2")
    for words in ([f"--{name}", "v2"], ["--config", str(tmp_path / "recipe.yaml")]):
        model, given = parse_arguments((ModelConfig,), words)
        assert (model.model_revision, given) == ("v2", {"model_revision": "v2"})
