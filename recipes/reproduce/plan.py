"""What a plan file says: arms, each a recipe and what it changes in it, run once a seed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_recipes.run import expect, read_mapping

RUN = "run.json"  # beside a collected run: its arm, seed, title and command


@dataclass(frozen=True)
class Arm:
    """One recipe and what the plan changes in it, run once a seed.

    `fields` are the plan's and, over them, the arm's own; `random_gpt2` (LAYERSxWIDTH) asks for random weights drawn
    by the run's seed, with the tokenizer of `model_name_or_path`; `expected_flops` is what a run is expected to take.
    """

    name: str
    recipe: str
    title: str
    seeds: tuple[int, ...]
    fields: Mapping[str, Any]
    random_gpt2: str | None
    expected_flops: float | None


@dataclass(frozen=True)
class Run:
    """An arm with one seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """The name of its folders."""
        return f"{self.arm.name}-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What a plan file says; its `name` is the file's, without `.yaml`."""

    name: str
    accelerate_config: str
    evaluate: bool
    arms: tuple[Arm, ...]

    def runs(self, only: Sequence[str] = ()) -> list[Run]:
        """Arm by arm, in the order of the file; all, or those whose arm's name or own name is in `only`.

        Raises `UserError` where no arm or run has such a name.
        """
        runs = [Run(arm, seed) for arm in self.arms for seed in arm.seeds]
        known = {name for run in runs for name in (run.arm.name, run.name)}
        unknown = [name for name in only if name not in known]
        expect(not unknown, "only", f"names of {', '.join(sorted(known))}", unknown)
        return [run for run in runs if not only or {run.arm.name, run.name} & set(only)]


def read_plan(path: Path) -> Plan:
    """Read a plan file; the recipes that it names must exist, which fields they have is for the runs to check.

    Raises `UserError` for no such file or recipe, broken YAML, or a key, name, seed or value that cannot be.
    """
    content, where = read_mapping(path), str(path)
    _check_keys(content, {"accelerate_config", "arms"}, {"evaluate", "with"}, where)
    _check_file(content["accelerate_config"], f"{where}, accelerate_config")
    evaluate, arms = content.get("evaluate", True), content["arms"]
    expect(isinstance(evaluate, bool), f"{where}, evaluate", "true or false", evaluate)
    expect(isinstance(arms, dict) and bool(arms), f"{where}, arms", "a mapping of one arm or more", arms)
    shared = _read_fields(content, where)
    read = tuple(_read_arm(name, arm, shared, f"{where}, arm {name}") for name, arm in arms.items())
    return Plan(path.stem, content["accelerate_config"], evaluate, read)


def _read_arm(name: object, content: object, shared: dict[str, Any], where: str) -> Arm:
    usable = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(name))
    expect(isinstance(name, str) and bool(usable), where, "a name of letters, digits, - and _", name)
    _check_keys(content, {"recipe", "title", "seeds"}, {"with", "random_gpt2", "expected_flops"}, where)
    recipe, title, seeds = content["recipe"], content["title"], content["seeds"]
    shape, flops = content.get("random_gpt2"), content.get("expected_flops")
    _check_file(recipe, f"{where}, recipe")
    expect(isinstance(title, str) and len(title.splitlines()) == 1, f"{where}, title", "one line of text", title)
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    expect(whole and bool(seeds), f"{where}, seeds", "a list of whole numbers from 0 to 2**32 - 1", seeds)
    expect(len(set(seeds)) == len(seeds), f"{where}, seeds", "each seed once", seeds)
    drawn = shape is None or re.fullmatch(r"[1-9]\d*x[1-9]\d*", str(shape))
    expect(bool(drawn), f"{where}, random_gpt2", "LAYERSxWIDTH such as 6x256", shape)
    # YAML reads 1.8e17, without a sign, as text.
    expect(flops is None or (type(flops) is float and flops > 0), f"{where}, expected_flops", "a number", flops)
    return Arm(name, recipe, title, tuple(seeds), shared | _read_fields(content, where), shape, flops)


def _read_fields(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    given, where = content.get("with", {}), f"{where}, with"
    expect(isinstance(given, dict), where, "a mapping", given)
    for name, value in given.items():
        parts = value if isinstance(value, list) else [value]
        plain = bool(parts) and all(isinstance(part, (str, bool, int, float)) for part in parts)
        expect(plain, f"{where}, {name}", "text, a number, true, false or a list of them", value)
    return given


def _check_keys(content: object, required: set[str], optional: set[str], where: str) -> None:
    expect(isinstance(content, dict), where, "a mapping", content)
    known = required | optional
    unknown = [name for name in content if name not in known]
    expect(not unknown, where, f"no keys but {', '.join(sorted(known))}", unknown)
    expect(required <= content.keys(), where, f"the keys {', '.join(sorted(required))}", list(content))


def _check_file(name: object, where: str) -> None:
    expect(isinstance(name, str) and Path(name).is_file(), where, "an existing file", name)
