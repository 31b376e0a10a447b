"""`reward-recipes COMMAND`: all commands under one name.

`python -m reward_recipes.COMMAND` runs the same, as `accelerate launch -m` needs it.
"""

import runpy
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from reward_recipes import shipped

COMMANDS = ("train", "audit", "score", "evaluate", "push", "ppo", "rloo", "plot", "recipes")
PAGES = {"plot": "plot_training", "-h": "commands", "--help": "commands"}


def _end(expected: str, found: str) -> NoReturn:
    print(f"error: expected {expected}, found {found!r}", file=sys.stderr)
    sys.exit(2)


def _recipes(words: list[str]) -> None:
    """List what is shipped, print where one stands, or copy it."""
    if not words:
        return print(shipped.listing())
    if [words[0], len(words)] not in (["--path", 2], ["--copy", 3]):
        _end("--path NAME, or --copy NAME FOLDER", " ".join(words))
    source = shipped.find(words[1]) or _end("a name that `reward-recipes recipes` lists", words[1])
    if words[0] == "--path":
        return print(source)
    copy = Path(words[2]) / source.name
    if copy.exists():
        _end("a folder that holds no such copy yet", str(copy))
    copy.parent.mkdir(parents=True, exist_ok=True)
    print((shutil.copytree if source.is_dir() else shutil.copy)(source, copy))


def main() -> None:
    """Run the command that the first word names."""
    words = sys.argv[1:] or ["--help"]
    module = PAGES.get(words[0], words[0])
    shipped.answer_help(module, words)
    if words[0] not in COMMANDS:
        _end(f"one of {', '.join(COMMANDS)}", words[0])
    if words[0] == "recipes":
        return _recipes(words[1:])
    sys.argv = words
    runpy.run_module(f"reward_recipes.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
