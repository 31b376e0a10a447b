"""What a plan file says: arms, each a recipe and what it changes in it, run once a seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reward_recipes.run import UserError, expect, read_mapping


@dataclass(frozen=True)
class Arm:
    """One recipe and what the plan changes in it, run once a seed.

    `changes` are the plan's and, over them, the arm's own; `random_gpt2` (LAYERSxWIDTH) asks for random weights drawn
    by the run's seed, with the tokenizer of `model_name_or_path`; `expected_flops` is what a run is expected to take.
    """

    name: str
    title: str
    recipe: str
    seeds: list[int]
    changes: dict[str, Any]
    random_gpt2: str | None = None
    expected_flops: float | None = None


class Run(NamedTuple):
    """An arm with one seed; its folders have its name."""

    name: str
    arm: Arm
    seed: int


@dataclass(frozen=True)
class Plan:
    """What a plan file says; its `name` is the file's, without `.yaml`."""

    name: str
    accelerate_config: str
    arms: Sequence[Arm]
    evaluate: bool = True

    def runs(self, only: Sequence[str] = ()) -> list[Run]:
        """Arm by arm, in the order of the file; all, or those whose arm's name or own name is in `only`.

        Raises `UserError` where no arm or run has such a name.
        """
        runs = [Run(f"{arm.name}-{seed}", arm, seed) for arm in self.arms for seed in arm.seeds]
        known = {name for run in runs for name in (run.arm.name, run.name)}
        expect(known.issuperset(only), "only", f"names of {', '.join(sorted(known))}", only)
        return [run for run in runs if not only or {run.arm.name, run.name} & set(only)]


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises `UserError` for no mapping, or a key too many or too few; a recipe and its fields are for its training to
    check.
    """
    content = read_mapping(path)
    shared, arms = content.pop("with", {}), content.pop("arms", {})
    try:
        arms = [Arm(name, changes={**shared, **arm.pop("with", {})}, **arm) for name, arm in arms.items()]
        plan = Plan(path.stem, arms=arms, **content)
        plan.runs()  # where `seeds` is no list, this fails
        return plan
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path}: expected a plan, found: {error}") from error
