"""What the collected files of finished runs say, one folder a run, beside the plan that asked for them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from reward_recipes import output
from reward_recipes.errors import UserError
from reward_recipes.plot_training import read_log
from reward_recipes.reproduce import RUN, Plan, Run


@dataclass(frozen=True)
class Finished:
    """The collected files of a run that came to its end."""

    run: Run
    folder: Path

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"expected {self.folder / name} of a finished run, found: {error}; collect it anew"
            ) from error

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the run says of itself at its end."""
        return self._json(output.SUMMARY)

    @cached_property
    def test(self) -> dict[str, Any]:
        """The figures of the test split."""
        return self._json(output.TEST_METRICS)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Scores of every test pair, by row of the split."""
        return pd.read_csv(self.folder / output.TEST_SCORES).set_index("row")

    @cached_property
    def log(self) -> pd.DataFrame:
        """The training log."""
        return read_log(self.folder / output.LOG)

    @property
    def pairs(self) -> int:
        """Different pairs trained on."""
        return self._json(output.AUDIT)["train"]["pairs_trained_on"]

    @property
    def margin(self) -> pd.Series:
        """Chosen minus rejected score of every test pair."""
        return self.scores["chosen_score"] - self.scores["rejected_score"]

    def files(self, page: Path) -> str:
        """Links to its log, picture and command."""
        folder = self.folder.relative_to(page.parent).as_posix()
        named = {"log": output.LOG, "picture": output.PICTURE, "figures": output.TEST_METRICS, "command": RUN}
        return ", ".join(f"[{name}]({folder}/{file})" for name, file in named.items())


@dataclass(frozen=True)
class Section:
    """A plan, where it is, and those of its runs that are finished."""

    plan: Plan
    path: Path
    results_dir: Path

    @cached_property
    def finished(self) -> dict[str, list[Finished]]:
        """By arm, in the plan's order; arms without a finished run are empty."""
        runs: dict[str, list[Finished]] = {arm.name: [] for arm in self.plan.arms}
        for run in self.plan.runs():
            folder = self.results_dir / self.plan.name / run.name
            if (folder / output.SUMMARY).is_file():
                runs[run.arm.name].append(Finished(run, folder))
        return runs

    @property
    def command(self) -> str:
        """What runs it."""
        return f"`python -m reward_recipes.reproduce --plan {self.path.as_posix()}`"
