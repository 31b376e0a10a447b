"""How YAML and the command line become options, and how they are saved as a recipe."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from trl import TrlParser

from reward_recipes.run.errors import UserError, expect
from reward_recipes.run.files import read_mapping, replacing

# Secrets (`token`: in model_init_kwargs), and what to do with an earlier run, which is asked anew each time.
NOT_SAVED = ("hub_token", "token", "overwrite_output_dir", "resume_from_checkpoint")

AS_THEY_ARE = (bool, list, dict, NoneType)  # values of YAML that are not turned into text
_NOT_GIVEN = object()


def option(default: Any, text: str) -> Any:
    """A dataclass's field with its default and the text that `--help` shows."""
    return field(default=default, metadata={"help": text})


def _complain(message: str) -> None:
    raise UserError(f"{message}; `--help` lists all options")


def parse_arguments(types: Sequence[type], args: Sequence[str] | None = None) -> list[Any]:
    """Read `--config FILE.yaml` and the command line, which wins.

    Args:
        types: dataclasses.
        args: command line without the program's name; default `sys.argv[1:]`.

    Returns:
        An instance of each dataclass, then the options that recipe and command line gave, by name.

    Raises:
        UserError: unknown key, unreadable YAML, or a value that does not fit its field.
    """
    parser, finder = TrlParser(types, allow_abbrev=False), ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = finder.error = _complain
    finder.add_argument("--config", type=Path)
    try:
        found, words = finder.parse_known_args(args)
        recipe = read_mapping(found.config) if found.config else {}
        expect("env" not in recipe, "env", "options of the run, not of the shell", recipe.get("env"))
        # As text, so that argparse holds a value to its field's type, as it does on the command line.
        texts = {name: value if isinstance(value, AS_THEY_ARE) else str(value) for name, value in recipe.items()}
        unknown = parser.set_defaults_with_config(**texts)
        given = recipe | _given_on_command_line(parser, types, words)
        *parsed, strays = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
        kinds = {spec.name: str(spec.type).lower() for kind in types for spec in fields(kind)}
        for name, value in recipe.items():
            expect(not isinstance(value, list) or "list" in kinds.get(name, "list"), name, "one value", value)
    except UserError:
        raise
    except Exception as error:  # transformers checks some values only by using them, and raises what comes of that
        raise UserError(f"recipe: {type(error).__name__}: {error}") from error
    if unknown := unknown + strays:
        _complain(f"unknown option: {' '.join(unknown)}; remove or correct it")
    return [*parsed, given]


def _given_on_command_line(parser: TrlParser, types: Sequence[type], words: list[str]) -> dict[str, Any]:
    """The options among the words; a name keeps the mark unless a word gives it a value."""
    names = [spec.name for kind in types for spec in fields(kind) if spec.init]
    namespace, _ = parser.parse_known_args(words, Namespace(**dict.fromkeys(names, _NOT_GIVEN)))
    return {name: value for name, value in vars(namespace).items() if value is not _NOT_GIVEN}


def save_recipe(path: Path, given: dict[str, Any]) -> None:
    """Write the options that were given as a YAML recipe that can be run again, without secrets."""
    kept = {name: value for name, value in given.items() if name not in NOT_SAVED}
    if init := kept.get("model_init_kwargs"):
        init = yaml.safe_load(init) if isinstance(init, str) else init  # JSON on the command line
        kept["model_init_kwargs"] = {name: value for name, value in init.items() if name not in NOT_SAVED}
    with replacing(path) as partial:
        partial.write_text(yaml.safe_dump(kept))
