"""How YAML and command line become options, each of its field's type, and options a recipe again."""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import TrlParser

from reward_recipes.run.errors import UserError, expect
from reward_recipes.run.yaml_files import read_yaml

# Secrets (`token`: in model_init_kwargs); what to do with an earlier run, which is asked anew each time; and the new
# names that transformers >= 5.23 gives to fields which recipes say under their old ones.
NOT_WRITTEN = (
    "hub_token",
    "push_to_hub_token",
    "token",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
)
# What transformers makes of a field that is not given.
UNSET_BECOMES: dict[str, Any] = {
    "accelerator_config": {k: v for k, v in AcceleratorConfig().to_dict().items() if k != "use_configured_state"},
    "dataloader_pin_memory": False,
    "debug": [],
    "disable_tqdm": bool(os.environ.get("CI")),
    "do_eval": True,
    "fsdp": False,
    "fsdp_config": {},
    "greater_is_better": True,
    "output_dir": "trainer_output",
    "pad_to_multiple_of": None,
    "report_to": [],
}
FOLLOWING = ("eval_steps", "save_steps")  # their defaults follow another field, so they are always written

PLAIN_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[str]: "a list of texts",
    NoneType: "nothing",
}
LARGEST_WHOLE = 2**53  # beyond it a float, which many fields become, is no longer exact
WORD_OR_FLAG = ("fsdp", "resume_from_checkpoint")  # true as well as words, which their hints do not say


def check_types(part: object) -> None:
    """Hold a dataclass to its own hints where they are plain: YAML values reach it unchecked.

    Raises:
        UserError: a field of another type.
    """
    hints = get_type_hints(type(part))
    for spec in fields(part):
        hint, value = hints[spec.name], getattr(part, spec.name)
        kinds = set(get_args(hint)) if isinstance(hint, UnionType) or get_origin(hint) is Union else {hint}
        # A default may break its own hint in one version or another of the libraries.
        if kinds <= set(PLAIN_TYPES) and spec.name not in WORD_OR_FLAG and value != spec.default:
            expected = " or ".join(words for kind, words in PLAIN_TYPES.items() if kind in kinds)
            expect(any(_is_of(value, kind) for kind in kinds), spec.name, expected, value)


def _is_of(value: object, kind: Any) -> bool:
    if kind == list[str]:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        return False
    return value == value and isinstance(value, (int, float) if kind is float else kind)  # NaN is no number


class RecipeParser(TrlParser):
    """TRL's parser whose complaints become `UserError`."""

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        super().__init__(dataclass_types, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise UserError(f"{message}; `--help` lists all options")


def parse_arguments(types: Sequence[type], args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read `--config FILE.yaml` and the command line, which wins, into an instance of each dataclass.

    Args:
        types: dataclasses.
        args: command line without the program's name; default `sys.argv[1:]`.

    Raises:
        UserError: unknown key, unreadable YAML, or a value that does not fit its field.
    """
    args = [word for text in (sys.argv[1:] if args is None else args) for word in _split_config(text)]
    parser = RecipeParser(types)
    try:
        unknown = parser.set_defaults_with_config(**_take_recipe(args))
        *parsed, strays = parser.parse_args_into_dataclasses(
            args, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except Exception as error:  # transformers checks some values only by using them, and raises what comes of that
        raise UserError(f"recipe: {type(error).__name__}: {error}") from error
    if unknown := unknown + strays:
        raise UserError(f"unknown option: {' '.join(unknown)}; remove or correct it, `--help` lists all options")
    return tuple(parsed)


def _take_recipe(args: list[str]) -> dict[str, Any]:
    """What stands in the file behind `--config`; both words are taken out of `args`."""
    if "--config" not in args:
        return {}
    place = args.index("--config")
    if place + 1 == len(args):
        raise UserError("--config: expected the path of a recipe, found nothing")
    path = args[place + 1]
    del args[place : place + 2]
    try:
        recipe = read_yaml(path)
    except OSError as error:
        raise UserError(f"--config: expected a recipe at {path}, found: {error.strerror}") from error
    if "env" in recipe:
        raise UserError("env: expected options of the run, found variables of the environment; set them in the shell")
    return recipe


def _split_config(word: str) -> list[str]:
    """TRL looks for `--config` and its path as two words only."""
    return word.split("=", 1) if word.startswith("--config=") else [word]


def save_recipe(path: Path, *parts: object) -> None:
    """Write the resolved configuration as a YAML recipe that can be run again, without secrets.

    Like a shipped recipe, it holds what differs from the defaults.
    """
    resolved = {}
    for part in parts:
        for spec in fields(part):
            value = _plain(getattr(part, spec.name))
            # A default instance to compare with would set up the devices anew, and this process would train alone.
            default = spec.default_factory() if callable(spec.default_factory) else spec.default
            differs = value not in (default, UNSET_BECOMES.get(spec.name, default)) or spec.name in FOLLOWING
            if spec.init and spec.name not in NOT_WRITTEN and differs:
                resolved[spec.name] = value
    path.write_text(yaml.safe_dump(resolved))


def _plain(value: object) -> object:
    """Enums and config objects to the words that a YAML recipe would hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in NOT_WRITTEN}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return getattr(value, "value", value)
