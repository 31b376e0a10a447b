"""What the collected files of finished runs say, one folder a run, beside the plan that asked for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plan import Plan, Run

from reward_recipes.evaluate import read_log
from reward_recipes.run import UserError, output, read_mapping

SUMMARY_KEYS = ("kept_step", "commit", "device", "cost")
COST_KEYS = ("weights", "packed", "num_unique_tokens", "num_padded_tokens", "seconds")
TEST_KEYS = ("test_accuracy", "test_accuracy_ci95", "test_loss", "test_ece")
SCORE_COLUMNS = ("row", "prompt_id", "chosen_length", "rejected_length", "chosen_score", "rejected_score")


@dataclass(frozen=True)
class Finished:
    """The collected files of a run that came to its end.

    `summary` is what it says of itself, `test` the figures of the test split, `pairs` how many it was trained on; `log`
    as `read_log` gives it; `scores` of every test pair by row of the split, None for a run older than that file.
    """

    run: Run
    folder: Path
    summary: dict[str, Any]
    test: dict[str, Any]
    pairs: int
    log: pd.DataFrame
    scores: pd.DataFrame | None


def read_finished(run: Run, folder: Path) -> Finished:
    """Read a folder that `reproduce` collected. Raises `UserError` for a file that is missing, broken or not whole."""
    summary = _holding(SUMMARY_KEYS, folder / output.SUMMARY)
    _check_keys(summary["cost"], COST_KEYS, folder / output.SUMMARY)
    test = _holding(TEST_KEYS, folder / output.TEST_METRICS)
    train = _holding(["train"], folder / output.AUDIT)["train"]
    _check_keys(train, ["pairs_trained_on"], folder / output.AUDIT)
    log = read_log(folder / output.LOG)
    if log["overfitting_gap"].isna().all():
        raise UserError(f"{folder / output.LOG}: expected an evaluation, found none; collect the run anew")
    return Finished(run, folder, summary, test, train["pairs_trained_on"], log, _scores(folder / output.TEST_SCORES))


def _holding(needed: Sequence[str], path: Path) -> dict[str, Any]:
    try:
        found = read_mapping(path)
    except UserError as error:
        raise UserError(f"{error}; or collect the run anew") from error
    _check_keys(found, needed, path)
    return found


def _check_keys(found: Any, needed: Sequence[str], path: Path) -> None:
    if not isinstance(found, dict) or not set(needed) <= found.keys():
        raise UserError(f"{path}: expected {', '.join(needed)}, found {str(found)[:60]}; collect the run anew")


def _scores(path: Path) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        return pd.read_csv(path, usecols=SCORE_COLUMNS, index_col="row")
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())
        raise UserError(f"expected {path} of a finished run, found: {found}; collect the run anew") from error


def margins(runs: Sequence[Finished]) -> np.ndarray:
    """(runs, n) chosen minus rejected scores of the same test pairs. Raises `UserError` where the pairs differ."""
    for run in runs:
        if not run.scores.index.equals(runs[0].scores.index):
            raise UserError(
                f"expected scores of the same test pairs in {runs[0].folder} and {run.folder}, found other rows in "
                f"{output.TEST_SCORES}; run one of them anew"
            )
    return np.stack([run.scores["chosen_score"] - run.scores["rejected_score"] for run in runs])


@dataclass(frozen=True)
class Section:
    """The part of a page that shows a plan's finished runs."""

    plan: Plan
    path: Path
    results_dir: Path
    page: Path

    @cached_property
    def finished(self) -> dict[str, list[Finished]]:
        """By arm, in the plan's order; arms without a finished run are empty."""
        runs: dict[str, list[Finished]] = {arm.name: [] for arm in self.plan.arms}
        for run in self.plan.runs():
            folder = self.results_dir / self.plan.name / run.name
            if folder.is_dir():
                runs[run.arm.name].append(read_finished(run, folder))
        return runs

    @property
    def picture(self) -> Path:
        """The plan's own picture, if it has one."""
        return self.results_dir / f"{self.plan.name}.png"

    def link(self, path: Path) -> str:
        """Where the page finds a file."""
        return Path(relpath(path, self.page.parent)).as_posix()
