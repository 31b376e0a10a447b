"""What the collected runs show, on one page: refills the tables of RESULTS.md. `python -m reward_recipes.results`.

Every figure between `<!-- begin NAME -->` and `<!-- end NAME -->` comes from the files in `results/NAME/`, one folder a
run of `recipes/reproduce/NAME.yaml`; runs of the plan without a folder are "not run". The text around is left alone.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from reward_recipes.collected import Section
from reward_recipes.config import check_types, parse_arguments
from reward_recipes.errors import UserError, run_cli
from reward_recipes.files import replacing
from reward_recipes.reproduce import read_plan
from reward_recipes.results_tables import TABLES


@dataclass
class ResultsArguments:
    """Where plans, collected runs and the page are. Raises `UserError` for a value of another type."""

    plans_dir: str = field(default="recipes/reproduce", metadata={"help": "Folder of the plans."})
    results_dir: str = field(default="results", metadata={"help": "Folder of the collected runs."})
    page: str = field(default="RESULTS.md", metadata={"help": "Page whose tables are refilled."})

    def __post_init__(self) -> None:
        check_types(self)


def write_results(plans_dir: Path, results_dir: Path, page: Path) -> None:
    """Refill the page's tables and draw the learning curve.

    Raises:
        UserError: a plan or a collected file cannot be read, or the page lacks the place of a table.
    """
    text = page.read_text("utf-8")
    for name, write in TABLES.items():
        path = plans_dir / f"{name}.yaml"
        section = Section(read_plan(path), path, results_dir)
        text = _filled(text, name, write(section, page), page)
    with replacing(page) as partial:
        partial.write_text(text, encoding="utf-8")


def _filled(text: str, name: str, content: str, page: Path) -> str:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(place.findall(text)) != 1:
        raise UserError(f"{page}: expected `{begin}` and `{end}` once, in this order; put them where the table belongs")
    return place.sub(lambda _: f"{begin}\n{content.strip()}\n{end}", text)


def main() -> None:
    """Refill the page."""
    (arguments,) = parse_arguments([ResultsArguments])
    write_results(Path(arguments.plans_dir), Path(arguments.results_dir), Path(arguments.page))


if __name__ == "__main__":
    run_cli(main)
