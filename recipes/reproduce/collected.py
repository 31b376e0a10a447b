"""What the collected files of a plan's finished runs say, as tables: a row a run, and a row a run and test pair."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from across_seeds import compute
from plan import Plan, Run

from reward_recipes.evaluate import read_log
from reward_recipes.run import expect, output, read_mapping

RESULTS = Path("results")  # in the repository's root, where commands are given
RUNS = RESULTS / "runs.csv"
# What a run was, what it gave, and where its files are.
RUN_COLUMNS = [
    *("plan", "run", "arm", "recipe", "seed", "commit", "model", "data", "device", "pairs", "kept_step"),
    *("test_accuracy", "test_accuracy_low", "test_accuracy_high", "test_loss", "test_ece", "lowest_eval_loss"),
    *("last_eval_loss", "last_gap", "median_grad_norm", "largest_grad_norm", "flops", "seconds", "folder"),
]
PAIR_COLUMNS = ["arm", "seed", "row", "prompt_id", "longer", "margin"]


def read_runs(plan: Plan) -> pd.DataFrame:
    """One row of `RUN_COLUMNS` for each finished run, in the plan's order.

    `pairs` are those that it was trained on, `flops` and `seconds` what that took; losses and gaps of evaluations and
    gradient norms are those of its log. Raises `UserError` for a file that is missing or broken.
    """
    runs = [(run, RESULTS / plan.name / run.name) for run in plan.runs()]
    rows = [_read_run(plan.name, run, folder) for run, folder in runs if folder.is_dir()]
    return pd.DataFrame(rows, columns=RUN_COLUMNS)


def _read_run(plan: str, run: Run, folder: Path) -> dict[str, Any]:
    summary, test, audit = (read_mapping(folder / name) for name in (output.SUMMARY, output.TEST_METRICS, output.AUDIT))
    given, log = read_mapping(Path(run.arm.recipe)) | run.arm.changes, read_log(folder / output.LOG)
    low, high = test["test_accuracy_ci95"] or (None, None)
    losses, gaps, norms = (log[name].dropna() for name in ("eval_loss", "overfitting_gap", "grad_norm"))
    return {
        **{name: (summary | test)[name] for name in RUN_COLUMNS if name in summary | test},
        **{"plan": plan, "run": run.name, "arm": run.arm.name, "recipe": run.arm.recipe, "seed": run.seed},
        "model": f"random GPT-2 {run.arm.random_gpt2}" if run.arm.random_gpt2 else _name(given["model_name_or_path"]),
        "data": _name(given["dataset_name"]),
        "pairs": audit["train"]["pairs_trained_on"],
        **{"test_accuracy_low": low, "test_accuracy_high": high},
        **{"lowest_eval_loss": losses.min(), "last_eval_loss": losses.iloc[-1], "last_gap": gaps.iloc[-1]},
        **{"median_grad_norm": norms.median(), "largest_grad_norm": norms.max()},
        **{"flops": compute(summary["cost"]), "seconds": summary["cost"]["seconds"], "folder": folder},
    }


def _name(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


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
