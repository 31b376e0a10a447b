"""How YAML and the command line become options, each of its field's type, and how they are saved as a recipe."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from reward_recipes.run.errors import UserError, expect
from reward_recipes.run.files import replacing
from reward_recipes.run.yaml_files import read_yaml

# Secrets (`token`: in model_init_kwargs), and what to do with an earlier run, which is asked anew each time.
NOT_SAVED = ("hub_token", "push_to_hub_token", "token", "overwrite_output_dir", "resume_from_checkpoint")

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
_NOT_GIVEN = object()


def option(default: Any, text: str) -> Any:
    """A dataclass's field with its default and the text that `--help` shows."""
    return field(default=default, metadata={"help": text})


def check_types(part: object) -> None:
    """Hold a dataclass to its own hints where they are plain, because values from YAML reach it unchecked.

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
    return parse_with_given(types, args)[0]


def parse_with_given(
    types: Sequence[type], args: Sequence[str] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As `parse_arguments`; beside the instances, the options that recipe and command line gave, by name."""
    words = [word for text in (sys.argv[1:] if args is None else args) for word in _split_config(text)]
    parser = RecipeParser(types)
    try:
        recipe = _take_recipe(words)
        unknown = parser.set_defaults_with_config(**recipe)
        given = recipe | _given_on_command_line(parser, types, words)
        *parsed, strays = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except Exception as error:  # transformers checks some values only by using them, and raises what comes of that
        raise UserError(f"recipe: {type(error).__name__}: {error}") from error
    if unknown := unknown + strays:
        raise UserError(f"unknown option: {' '.join(unknown)}; remove or correct it, `--help` lists all options")
    return tuple(parsed), given


def _given_on_command_line(parser: RecipeParser, types: Sequence[type], words: list[str]) -> dict[str, Any]:
    """The options among the words; argparse sets no default where the namespace has the name already."""
    names = [spec.name for kind in types for spec in fields(kind) if spec.init]
    namespace, _ = parser.parse_known_args(words, Namespace(**dict.fromkeys(names, _NOT_GIVEN)))
    return {name: value for name, value in vars(namespace).items() if name in names and value is not _NOT_GIVEN}


def _take_recipe(words: list[str]) -> dict[str, Any]:
    """What stands in the file behind `--config`; both words are taken out."""
    if "--config" not in words:
        return {}
    place = words.index("--config")
    if place + 1 == len(words):
        raise UserError("--config: expected the path of a recipe, found nothing")
    path = words[place + 1]
    del words[place : place + 2]
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


def save_recipe(path: Path, given: dict[str, Any]) -> None:
    """Write the options that were given as a YAML recipe that can be run again, without secrets."""
    with replacing(path) as partial:
        partial.write_text(yaml.safe_dump(_without_secrets(given)))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):  # a mapping, as the command line gives it
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items() if key not in NOT_SAVED}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return getattr(value, "value", value)  # an enum's word
