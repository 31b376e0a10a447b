"""`--help` is there at once, and its pages say what the live parsers say; `--help_all` leaves no option out."""

import re
import resource
import subprocess
import sys
from dataclasses import fields
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

try:
    from reward_recipes.policy.ppo import PPORecipeConfig
except ImportError:  # TRL 1.12 is the last release with PPO
    PPORecipeConfig = None
PAGES = {
    "train": (ScriptArguments, RewardRecipeConfig, ModelConfig),
    "audit": (ScriptArguments, RewardRecipeConfig, ModelConfig),
    "score": (ScoreArguments,),
    "evaluate": (EvaluationArguments,),
    "rloo": (ScriptArguments, RLOORecipeConfig, ModelConfig, PolicyArguments),
    "ppo": (ScriptArguments, PPORecipeConfig, ModelConfig, PolicyArguments),
}
MODULES = (*PAGES, "push", "plot_training", "recipes")


def own_texts(types: tuple[type, ...]) -> dict[str, str]:
    """The text and default of each field that this package declares."""
    texts = {}
    for kind in types:
        classes = [base for base in kind.__mro__ if base.__module__.startswith("reward_recipes")]
        for spec in fields(kind):
            if any(spec.name in vars(base).get("__annotations__", {}) for base in classes):
                texts[spec.name] = spec.metadata["help"] + default(spec.default)
    return texts


def default(value: object) -> str:
    shown = str(value).lower() if isinstance(value, bool) else value
    return f" [{shown}]" if isinstance(shown, (str, int, float)) and shown != "" else ""


def entries(module: str) -> dict[str, str]:
    """The page's options, each with its text on one line."""
    found = re.findall(r"^  --(\w+) (.+(?:\n {20}.+)*)", help_page(module), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


@pytest.mark.parametrize("module", PAGES)
def test_a_page_says_what_the_parser_does(module: str) -> None:
    """A field that is new or changed fails here with the line that its page needs."""
    types, shown = PAGES[module], entries(module)
    if None in types:
        pytest.skip("PPO needs TRL 1.12")
    own = own_texts(types)
    if module == "audit":
        own = {name: text for name, text in own.items() if name in shown}
    assert {name: shown.get(name) for name in own} == own
    live = {spec.name: spec for kind in types for spec in fields(kind)}
    for name, text in shown.items():
        if name not in ("config", "help_all"):
            spec = live["model_revision" if name == "revision" and name not in live else name]
            assert text.endswith(default(spec.default)) or name == "lora_task_type", (name, text)


def test_help_is_short_and_there_before_torch_could_be(tmp_path: Path) -> None:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    for words in (*([f"reward_recipes.{name}"] for name in MODULES[:-1]), ["reward_recipes", "recipes"]):
        command = [sys.executable, "-m", *words, "--help"]
        done = subprocess.run(command, env={"PYTHONPATH": str(PACKAGE.parent)}, cwd=tmp_path, capture_output=True)
        page = help_page(words[-1].removeprefix("reward_recipes."))
        assert (done.returncode, done.stdout.decode()) == (0, page), done.stderr
        assert page.count("\n") < 120 and max(map(len, page.splitlines())) <= 120
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime) / len(MODULES) < 1  # seconds of CPU time


def test_help_all_adds_what_the_page_lacks_and_has_an_effect(capsys: pytest.CaptureFixture[str]) -> None:
    for words, stop in ((["--help"], 0), (["--help_all"], None)):
        with pytest.raises(SystemExit) as stopped:
            parse_recipe(words)
        assert stopped.value.code == stop
    printed = capsys.readouterr().out.removeprefix(help_page("train"))
    assert printed.startswith(help_page("train"))
    listed = set(re.findall(r"--(\w+)", printed.removeprefix(help_page("train")))) | entries("train").keys()
    actions = TrlParser(PAGES["train"])._actions
    found = {action.dest for action in actions if {name[2:] for name in action.option_strings} & listed}
    dests = {action.dest for action in actions}
    assert dests - found - {"help"} == WITHOUT_USE & dests


def test_revision_has_one_name_in_all_commands() -> None:
    for words in (["--revision", "v2"], ["--model_revision", "v2"]):
        model, given = parse_arguments((ModelConfig,), words)
        assert (model.model_revision, given) == ("v2", {"model_revision": "v2"})
