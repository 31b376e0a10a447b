"""`reward-recipes COMMAND`: all commands under one name.

`python -m reward_recipes.COMMAND` runs the same, as `accelerate launch -m` needs it.
"""

import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from reward_recipes import shipped

MODULES = {
    "train": "train",
    "audit": "audit",
    "score": "score.__main__",
    "evaluate": "evaluate.__main__",
    "push": "push.__main__",
    "ppo": "ppo",
    "rloo": "rloo",
    "plot": "plot_training",
}


def _recipes(words: Sequence[str]) -> None:
    """List what is shipped, print where one stands, or copy it."""
    match words:
        case []:
            print(shipped.listing())
        case ["--path", name]:
            print(_found(name))
        case ["--copy", name, folder]:
            source, target = _found(name), Path(folder)
            if (copy := target / source.name).exists():
                _end(f"expected no {source.name} in {target}, found one; give another folder")
            target.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
            print(copy)
        case _:
            _end(f"recipes: expected nothing, --path NAME, or --copy NAME FOLDER, found {' '.join(words)!r}")


def _found(name: str) -> Path:
    return shipped.find(name) or _end(f"expected a name that `reward-recipes recipes` lists, found {name!r}")


def _end(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Run the command that the first word names."""
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        shipped.answer_help("commands", ["--help"])
    module = MODULES.get(command, command)
    shipped.answer_help(module, words)
    if command == "recipes":
        return _recipes(words)
    if command not in MODULES:
        _end(f"expected one of {', '.join(MODULES)}, recipes; found {command!r}")
    sys.argv = [f"reward-recipes {command}", *words]
    entry = import_module(f"reward_recipes.{module}")
    import_module("reward_recipes.run").run_cli(entry.main)


if __name__ == "__main__":
    main()
