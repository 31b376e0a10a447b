"""What the collected runs show, on one page: refills RESULTS.md, and `results/runs.csv` with a row for each run.

Run it as `python recipes/reproduce/results.py` in the repository's root. Every figure between `<!-- begin NAME -->` and
`<!-- end NAME -->` comes from the files in `results/NAME/`, one folder a run of `recipes/reproduce/NAME.yaml`; a run of
the plan without a folder is "not run". The text around stays as it is.
"""

from pathlib import Path

import pandas as pd
from collected import RUNS, read_runs
from plan import read_plan
from result_tables import TABLES

from reward_recipes.run import expect, replacing, run_cli

PAGE = Path("RESULTS.md")


def main() -> None:
    """Refill the page's tables, draw the plans' pictures, and list all runs."""
    text, listed = PAGE.read_text("utf-8"), []
    for name, write in TABLES.items():
        plan = read_plan(Path("recipes", "reproduce", f"{name}.yaml"))
        before, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        expect(bool(begin and end), str(PAGE), f"`<!-- begin {name} -->`, then `<!-- end {name} -->`", "not both")
        runs = read_runs(plan)
        listed.append(runs)
        text = f"{before}{begin}{write(plan, runs)}\n{end}{after}"
    RUNS.parent.mkdir(exist_ok=True)
    with replacing(RUNS) as partial:
        pd.concat([runs for runs in listed if len(runs)] or listed).to_csv(partial, index=False, float_format="%.6g")
    with replacing(PAGE) as partial:
        partial.write_text(text, "utf-8")


if __name__ == "__main__":
    run_cli(main)
