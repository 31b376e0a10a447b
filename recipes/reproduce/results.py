"""What the collected runs show, on one page: refills the tables of RESULTS.md.

Run it as `python recipes/reproduce/results.py`. Every figure between `<!-- begin NAME -->` and `<!-- end NAME -->`
comes from the files in `results/NAME/`, one folder a run of `recipes/reproduce/NAME.yaml`; a run of the plan without a
folder is "not run". The text around stays as it is.
"""

import argparse
from pathlib import Path

from collected import Section
from plan import read_plan
from result_tables import TABLES

from reward_recipes.run import UserError, replacing, run_cli


def write_results(plans_dir: Path, results_dir: Path, page: Path) -> None:
    """Refill the page's tables and draw the plans' pictures.

    Raises:
        UserError: a plan or a collected file cannot be read, there is no such folder, or the page lacks the place of a
            table.
    """
    if not results_dir.is_dir():
        raise UserError(f"expected a folder of collected runs, found none at {results_dir}; check --results_dir")
    text = page.read_text("utf-8")
    for name, write in TABLES.items():
        path = plans_dir / f"{name}.yaml"
        text = _filled(text, name, write(Section(read_plan(path), path, results_dir, page)), page)
    with replacing(page) as partial:
        partial.write_text(text, "utf-8")


def _filled(text: str, name: str, content: str, page: Path) -> str:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found or text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{page}: expected `{begin}` and `{end}` once, in this order; put them where the table belongs")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main() -> None:
    """Refill the page."""
    parser = argparse.ArgumentParser(description="Refill the tables of the results' page from collected runs.")
    parser.add_argument("--plans_dir", type=Path, default=Path("recipes/reproduce"), help="folder of the plans")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="folder of the collected runs")
    parser.add_argument("--page", type=Path, default=Path("RESULTS.md"), help="page whose tables are refilled")
    write_results(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_cli(main)
