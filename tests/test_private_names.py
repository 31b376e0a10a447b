"""The private names of transformers and TRL that the package uses are there, with the parameters that it relies on.

A name that a new version renames or changes fails here by name, instead of never being called.
"""

import ast
import inspect
from pathlib import Path

import pytest
from transformers import GPT2Config, Trainer
from trl import RewardConfig, RewardTrainer

import reward_recipes

SOURCES = Path(reward_recipes.__file__).parent
# The owner, the parameters of a method, and what the name is for.
PRIVATE_NAMES = {
    "_save_checkpoint": (Trainer, ["self", "model", "trial"], "a checkpoint counts only once its manifest is written"),
    "_save": (Trainer, ["self", "output_dir", "state_dict"], "no pickle of arguments, and a full disk is a warning"),
    "_determine_best_metric": (Trainer, ["self", "metrics", "trial"], "a new best step's weights are saved at once"),
    "_get_grad_norm": (Trainer, ["self", "model", "grad_norm"], "a bad gradient ends the run before weights change"),
    "_metrics": (RewardTrainer, None, "TRL's means of batch means must not overwrite exact figures"),
    "_attn_implementation": (GPT2Config, None, "packing needs an attention that takes a mask"),
}


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_private_name_is_there_and_has_its_parameters(name: str) -> None:
    owner, parameters, purpose = PRIVATE_NAMES[name]
    if parameters is not None:
        found = list(inspect.signature(getattr(owner, name)).parameters)
        assert found == parameters, f"{owner.__name__}.{name} changed; it is for: {purpose}"
    elif owner is RewardTrainer:
        assert f"self.{name} = " in inspect.getsource(RewardTrainer.__init__), f"{name} is gone; it is for: {purpose}"
    else:
        assert hasattr(owner(), name), f"{owner.__name__}.{name} is gone; it is for: {purpose}"


def test_trainer_calls_what_is_overridden() -> None:
    """An override that nothing calls would be a check that never runs."""
    source = inspect.getsource(Trainer)
    for name, (owner, _, purpose) in PRIVATE_NAMES.items():
        if owner is Trainer:
            assert f"self.{name}(" in source, f"Trainer no longer calls {name}; it is for: {purpose}"


def test_no_other_private_name_is_used() -> None:
    """Of all `x._name` in the sources, those that the libraries' trainers and configs have are listed above."""
    theirs = {*dir(RewardTrainer), *dir(GPT2Config()), *dir(RewardConfig), "_metrics"}
    used = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Attribute, ast.FunctionDef)):
                name = node.attr if isinstance(node, ast.Attribute) else node.name
                if name.startswith("_") and not name.startswith("__") and name in theirs:
                    used.add(name)
    assert used == set(PRIVATE_NAMES)
    assert len(PRIVATE_NAMES) <= 6
