"""What comes with the package beside its code: recipes, Accelerate configurations and pages of help, found by name.

It imports nothing that takes time, so that `--help` and the list of recipes are there at once.
"""

import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent


def _folder(name: str) -> Path:
    """Installed, it stands in the package; in a clone, at the root."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parents[1] / name


RECIPES, ACCELERATE = _folder("recipes"), _folder("accelerate_configs")


def find(name: str) -> Path | None:
    """The recipe, folder of recipes or Accelerate configuration of this name; None if there is none."""
    places = [path for folder in (RECIPES, ACCELERATE) for path in (folder / f"{name}.yaml", folder / name)]
    return next((path for path in places if path.exists()), None)


def listing() -> str:
    """A line for each recipe and configuration: its name, and what the comment at its beginning says."""
    lines = []
    for folder, patterns in ((RECIPES, ("demo/*.yaml", "*/*/*.yaml")), (ACCELERATE, ("*.yaml",))):
        lines.append(f"{folder.name}:")
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            name = path.relative_to(folder).with_suffix("").as_posix()
            lines.append(f"  {name:<32} {textwrap.shorten(_about(path), 84, placeholder=' ...')}")
    return "\n".join(lines)


def _about(path: Path) -> str:
    """The first sentence of the comment; a recipe's stands below its launch command and an empty line."""
    comment = re.match(r"(?:#.*\n)*", path.read_text("utf-8"))[0]
    words = " ".join(re.split(r"^#\n", comment, maxsplit=1, flags=re.M)[-1].replace("#", " ").split())
    return words.partition(". ")[0].removesuffix(".") + "."


def help_page(module: str) -> str:
    """What `--help` prints for `reward_recipes.MODULE`; `tests/run/test_help.py` holds it to the live parser."""
    return (PACKAGE / "help" / f"{module}.txt").read_text("utf-8")


def answer_help(module: str, words: Sequence[str]) -> None:
    """Print the page and end the process, if the words ask for help and the page can give it."""
    name = module.removesuffix(".__main__").removeprefix("reward_recipes.")
    if not (PACKAGE / "help" / f"{name}.txt").is_file() or not {"-h", "--help", "--help_all"} & {*words}:
        return
    page = help_page(name)
    if "--help_all" not in words or "--help_all" not in page:  # the live parser adds to the page
        print(page, end="")
        sys.exit()
