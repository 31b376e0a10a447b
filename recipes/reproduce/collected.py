"""What the collected files of a plan's finished runs say, as tables: a row a run, and a row a run and test pair."""

from pathlib import Path

import numpy as np
import pandas as pd
from across_seeds import compute
from plan import Plan

from reward_recipes.run import expect, output, read_mapping

RESULTS = Path("results")  # in the repository's root, where commands are given
RUN_COLUMNS = [
    *("run", "arm", "seed", "folder", "pairs", "kept_step", "commit", "device", "seconds", "flops"),
    *("test_accuracy", "test_accuracy_ci95", "test_loss", "test_ece"),
]
PAIR_COLUMNS = ["arm", "seed", "row", "prompt_id", "longer", "margin"]


def read_runs(plan: Plan) -> pd.DataFrame:
    """One row of `RUN_COLUMNS` for each finished run, in the plan's order.

    `pairs` are those that it was trained on, `seconds` and `flops` what that took. Raises `UserError` for a file that
    is missing or broken.
    """
    rows = []
    for run in plan.runs():
        folder = RESULTS / plan.name / run.name
        if folder.is_dir():
            names = (output.SUMMARY, output.TEST_METRICS, output.AUDIT)
            summary, test, audit = (read_mapping(folder / name) for name in names)
            own = {"run": run.name, "arm": run.arm.name, "seed": run.seed, "folder": folder}
            own |= {"seconds": summary["cost"]["seconds"], "flops": compute(summary["cost"])}
            rows.append({**summary, **test, **own, "pairs": audit["train"]["pairs_trained_on"]})
    return pd.DataFrame(rows, columns=RUN_COLUMNS)


def read_pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """One row of `PAIR_COLUMNS` for each run and test pair.

    `row` is the pair's in the split; `longer` is 1 if its chosen text has more tokens, -1 if it has fewer, else 0;
    `margin` is the chosen text's score less the rejected one's.
    """
    parts = [pd.DataFrame(columns=PAIR_COLUMNS)]
    for run in runs.itertuples():
        scores = pd.read_csv(run.folder / output.TEST_SCORES)
        longer = np.sign(scores["chosen_length"] - scores["rejected_length"])
        margin = scores["chosen_score"] - scores["rejected_score"]
        parts.append(scores.assign(arm=run.arm, seed=run.seed, longer=longer, margin=margin)[PAIR_COLUMNS])
    return pd.concat(parts[1:] or parts)


def margins(pairs: pd.DataFrame) -> pd.DataFrame:
    """(n, runs) margins of the n test pairs, with `prompt_id` in the index. Raises `UserError` where pairs differ."""
    found = pairs.pivot(index=["row", "prompt_id"], columns=["arm", "seed"], values="margin")
    whole = not found.isna().any(axis=None)
    expect(whole, output.TEST_SCORES, "the same test pairs in each of these runs", list(found.columns))
    return found
