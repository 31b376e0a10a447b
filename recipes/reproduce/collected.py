"""What the collected files of a plan's finished runs say, run by run as tables, and over seeds."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from plan import Plan, Run
from scipy import stats

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
CONFIDENCE = 0.95


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
    # 6 FLOPs for each weight and token computed, without attention between tokens and embeddings: Kaplan et al., 2020,
    # Scaling Laws for Neural Language Models, section 2.1.
    cost = summary["cost"]
    tokens = cost["num_unique_tokens" if cost["packed"] else "num_padded_tokens"]
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
        **{"flops": 6.0 * cost["weights"] * tokens, "seconds": cost["seconds"], "folder": folder},
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


class Estimate(NamedTuple):
    """A figure and the ends of its 95% interval by Student's t, where it has one."""

    value: float
    interval: tuple[float, float] | None


def _estimate(value: float, standard_error: float, freedom: int) -> Estimate:
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * standard_error
    return Estimate(float(value), (float(value - reach), float(value + reach)))


def mean_over_runs(values: pd.Series) -> Estimate:
    """The mean of one figure a run, n > 0; fewer than three give no interval: that of two is 12.7 errors long."""
    mean = values.mean()
    # scipy's `ttest_1samp` has this interval too, but warns when all runs have the same figure.
    return _estimate(mean, values.sem(), len(values) - 1) if len(values) > 2 else Estimate(mean, None)


def learning_curve(pairs: np.ndarray, accuracy: np.ndarray, at: float) -> tuple[Estimate, Estimate]:
    """What a doubling of the training pairs gains, and the accuracy to expect `at` a number of them.

    Both are of a line a + b log2(pairs), fitted by least squares to (n,) pairs and accuracies of runs, n > 2. Their
    intervals are about other runs on the same test pairs, whose own luck moves all runs up or down together; they take
    runs as independent, and that the line goes on to `at`.
    """
    # Counted in doublings of `at`, the intercept is the accuracy there.
    fit, freedom = stats.linregress(np.log2(pairs / at), accuracy), len(pairs) - 2
    return _estimate(fit.slope, fit.stderr, freedom), _estimate(fit.intercept, fit.intercept_stderr, freedom)


def agreement(margins: np.ndarray) -> float:
    """Share of pairs on which two runs prefer the same side, over all twos of (n, runs) margins; a tie is half."""
    signs = np.sign(margins)
    first, second = np.triu_indices(signs.shape[1], k=1)
    return float(np.mean((1 + signs[:, first] * signs[:, second]) / 2))
