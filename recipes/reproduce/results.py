"""What the collected runs show, on one page: refills the tables of RESULTS.md.

Run it as `python recipes/reproduce/results.py` in the repository's root. Every figure between `<!-- begin NAME -->` and
`<!-- end NAME -->` comes from the files in `results/NAME/`, one folder a run of `recipes/reproduce/NAME.yaml`; a run of
the plan without a folder is "not run". The text around stays as it is.
"""

from pathlib import Path

from collected import read_runs
from plan import read_plan
from result_tables import TABLES

from reward_recipes.run import UserError, replacing, run_cli

PAGE = Path("RESULTS.md")


def main() -> None:
    """Refill the page's tables and draw the plans' pictures."""
    text = PAGE.read_text("utf-8")
    for name, write in TABLES.items():
        plan = read_plan(Path("recipes", "reproduce", f"{name}.yaml"))
        text = _filled(text, name, write(plan, read_runs(plan)))
    with replacing(PAGE) as partial:
        partial.write_text(text, "utf-8")


def _filled(text: str, name: str, content: str) -> str:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise UserError(f"{PAGE}: expected `{begin}` and `{end}`, in this order; put them where the table belongs")
    return f"{before}{begin}\n{content}\n{end}{after}"


if __name__ == "__main__":
    run_cli(main)
