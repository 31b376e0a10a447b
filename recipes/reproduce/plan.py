"""What a plan file says: arms, each a recipe and what it changes in it, run once a seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from trl import ModelConfig, ScriptArguments

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.run import UserError, expect, read_mapping

RUN = "run.json"  # beside a collected run: its arm, seed, title and command
SET_BY_PLAN = {"output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir"}
RECIPE_FIELDS = {spec.name for part in (ScriptArguments, RewardRecipeConfig, ModelConfig) for spec in fields(part)}


@dataclass(frozen=True)
class Arm:
    """One recipe and what the plan changes in it, run once a seed.

    `changes` are the plan's and, over them, the arm's own; `random_gpt2` (LAYERSxWIDTH) asks for random weights drawn
    by the run's seed, with the tokenizer of `model_name_or_path`; `expected_flops` is what a run is expected to take.
    """

    name: str
    title: str
    recipe: str
    seeds: Sequence[int]
    changes: Mapping[str, Any]
    random_gpt2: str | None = None
    expected_flops: float | None = None

    def __post_init__(self) -> None:
        flops = self.expected_flops  # YAML reads 1.8e17, without a sign, as text
        expect(not isinstance(flops, str), "expected_flops", "a number", flops)
        expect(Path(self.recipe).is_file(), "recipe", "an existing file", self.recipe)
        once = isinstance(self.seeds, list) and len(set(self.seeds)) == len(self.seeds) > 0
        expect(once, "seeds", "a list of numbers, each once", self.seeds)
        unknown = sorted(self.changes.keys() - (RECIPE_FIELDS - SET_BY_PLAN))
        expect(not unknown, "with", f"fields of a recipe other than {', '.join(sorted(SET_BY_PLAN))}", unknown)


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
        unknown = [name for name in only if name not in known]
        expect(not unknown, "only", f"names of {', '.join(sorted(known))}", unknown)
        return [run for run in runs if not only or {run.arm.name, run.name} & set(only)]


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises `UserError` for no mapping, a key too many or too few, a value of another type, a recipe that is not there,
    or a change of what no recipe has or the plan sets; which values a recipe takes is for its training to check.
    """
    content = read_mapping(path)
    shared, arms = content.pop("with", {}), content.pop("arms", None)
    try:
        expect(isinstance(arms, dict), "arms", "a mapping", arms)
        return Plan(path.stem, arms=[_read_arm(name, arm, shared) for name, arm in arms.items()], **content)
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: expected a plan, found: {error}; mend it") from error


def _read_arm(name: str, content: dict[str, Any], shared: Mapping[str, Any]) -> Arm:
    try:
        return Arm(name, changes={**shared, **content.pop("with", {})}, **content)
    except (AttributeError, TypeError, UserError) as error:
        raise UserError(f"arm {name}, {error}") from error
