"""How YAML and the command line become options, and how they are saved as a recipe."""

import re
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from reward_recipes import shipped
from reward_recipes.run.checks import NOT_HONOURED
from reward_recipes.run.errors import UserError, expect
from reward_recipes.run.files import read_mapping, replacing

# Secrets (`token`: in model_init_kwargs), and what to do with an earlier run, which is asked anew each time.
NOT_SAVED = ("hub_token", "token", "overwrite_output_dir", "resume_from_checkpoint")

# Left out by `--help_all`: what has no effect in our commands, and `model_revision`, which is `revision` there.
WITHOUT_USE = {*NOT_HONOURED, "do_train", "do_eval", "do_predict", "greater_is_better"}
WITHOUT_USE |= {"remove_unused_columns", "model_revision", "sft_model_path"}

AS_THEY_ARE = bool | list | dict | None  # values of YAML that are not turned into text
_NOT_GIVEN = object()


def option(default: Any, text: str) -> Any:
    """A dataclass's field with its default and the text that `--help` shows."""
    return field(default=default, metadata={"help": text})


def _complain(message: str) -> None:
    raise UserError(f"{message}; `--help` lists the options")


def parse_arguments(types: Sequence[type], args: Sequence[str] | None = None, page: str = "") -> list[Any]:
    """Read `--config`, a file or the name of a shipped recipe, and the command line `args`, which wins.

    Returns:
        An instance of each dataclass, then the options that recipe and command line gave, by name.

    Raises:
        UserError: unknown key, unreadable YAML, or a value that does not fit its field.
    """
    parser, finder = _parser(types, page), ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = finder.error = _complain
    finder.add_argument("--config")
    finder.add_argument("--help_all", action="store_true")
    try:
        found, words = finder.parse_known_args(args)
        if found.help_all:
            _print_all_options(parser)
        recipe = _read_recipe(found.config, types) if found.config else {}
        # As text, so that argparse holds a value to its field's type, as it does on the command line.
        texts = {name: value if isinstance(value, AS_THEY_ARE) else str(value) for name, value in recipe.items()}
        unknown = parser.set_defaults_with_config(**texts)
        # A name keeps the mark unless a word of the command line gives it a value.
        told, _ = parser.parse_known_args(words, Namespace(**dict.fromkeys(_names(types), _NOT_GIVEN)))
        given = recipe | {name: value for name, value in vars(told).items() if value is not _NOT_GIVEN}
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


def _parser(types: Sequence[type], page: str) -> TrlParser:
    """TRL's parser, which knows `model_revision` by the name that all our commands have for it, with our help."""
    parser = TrlParser(types, allow_abbrev=False)
    if "model_revision" in _names(types):
        parser.add_argument("--revision", dest="model_revision", default=SUPPRESS)
    if page:
        parser.format_help = partial(shipped.help_page, page)
    return parser


def _names(types: Sequence[type]) -> list[str]:
    return [spec.name for kind in types for spec in fields(kind) if spec.init]


def _print_all_options(parser: TrlParser) -> None:
    """Print the page of help, then TRL's texts on all other options that have an effect here, and end the process."""
    page = parser.format_help()
    shown = {*re.findall(r"^  --(\w+)", page, re.MULTILINE), *WITHOUT_USE, "help"}
    for action in parser._actions:
        if shown & {action.dest, *(name.removeprefix("--") for name in action.option_strings)}:
            action.help = SUPPRESS
    parser.usage = SUPPRESS
    print(f"{page}\nother options, as TRL and transformers describe them\n{ArgumentParser.format_help(parser)}", end="")
    raise SystemExit


def _read_recipe(name: str, types: Sequence[type]) -> dict[str, Any]:
    """The options in a file, or in the recipe that is shipped under this name."""
    path, known = Path(name), shipped.find(name)
    path = path if path.is_file() or known is None else known  # an output folder may have a recipe's name
    expect(path.exists(), "config", "a recipe's file, or a name that `reward-recipes recipes` lists", name)
    recipe = read_mapping(path)
    expect("env" not in recipe, "env", "options of the run, not of the shell", recipe.get("env"))
    if "revision" in recipe and "revision" not in _names(types):
        recipe["model_revision"] = recipe.pop("revision")
    return recipe


def save_recipe(path: Path, given: dict[str, Any]) -> None:
    """Write the options that were given as a YAML recipe that can be run again, without secrets."""
    kept = {name: value for name, value in given.items() if name not in NOT_SAVED}
    if init := kept.get("model_init_kwargs"):
        init = yaml.safe_load(init) if isinstance(init, str) else init  # JSON on the command line
        kept["model_init_kwargs"] = {name: value for name, value in init.items() if name not in NOT_SAVED}
    with replacing(path) as partial:
        partial.write_text(yaml.safe_dump(kept))
