"""How a plan of runs becomes results: trained, evaluated, collected in turn. `python -m reward_recipes.reproduce`.

All that stands behind a bare `--` goes to every training run as it is: `-- --use_cpu true`, or a stand-in model.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, ScriptArguments

from reward_recipes import hub, output
from reward_recipes.checkpoints import checkpoints
from reward_recipes.config import RewardRecipeConfig, _take_recipe, check_types, parse_arguments
from reward_recipes.errors import UserError, run_cli
from reward_recipes.files import replacing
from reward_recipes.modeling import write_random_gpt2
from reward_recipes.scrub import Scrubber
from reward_recipes.tokens import load_tokenizer

RUN = "run.json"
COLLECTED = (*hub.OWN, output.TEST_SCORES)
LAUNCH = ["accelerate", "launch"]
# The same without a PATH, and without the launcher's own traceback below a run's error.
LAUNCH_HERE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
SET_BY_PLAN = {"output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir"}
RECIPE_FIELDS = {
    spec.name for part in (ScriptArguments, RewardRecipeConfig, ModelConfig) for spec in fields(part) if spec.init
}
EVALUATED_ON = ("dataset_name", "dataset_config", "dataset_data_dirs", "dataset_test_split")


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

    def runs(self) -> list[Run]:
        """Arm by arm, in the order of the file."""
        return [Run(arm, seed) for arm in self.arms for seed in arm.seeds]


@dataclass
class ReproduceArguments:
    """Which plan, and where to. Raises `UserError` for a value of another type than its field's."""

    plan: str = field(metadata={"help": "Plan file, such as recipes/reproduce/full.yaml."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the runs. Default: outputs/PLAN."})
    results_dir: str = field(default="results", metadata={"help": "The runs' small files go to PLAN/RUN in here."})
    only: list[str] | None = field(default=None, metadata={"help": "Names of the arms or runs to do. Default: all."})
    dry_run: bool = field(default=False, metadata={"help": "Print the training commands, and run nothing."})

    def __post_init__(self) -> None:
        check_types(self)


def read_plan(path: Path) -> Plan:
    """Read a plan file; the recipes that it names must exist, their values are checked by the runs.

    Raises:
        UserError: no such file or recipe, broken YAML, or a key, field, name or seed that cannot be.
    """
    content, where = _read(path), str(path)
    _check_keys(content, {"accelerate_config", "arms"}, {"evaluate", "with"}, where)
    _check_file(content["accelerate_config"], f"{where}, accelerate_config")
    evaluate, arms = content.get("evaluate", True), content["arms"]
    _expect(isinstance(evaluate, bool), f"{where}, evaluate", "true or false", evaluate)
    _expect(isinstance(arms, dict) and bool(arms), f"{where}, arms", "a mapping of one arm or more", arms)
    shared = _read_fields(content, where)
    read = tuple(_read_arm(name, arm, shared, where) for name, arm in arms.items())
    return Plan(path.stem, content["accelerate_config"], evaluate, read)


def _read_arm(name: object, content: object, shared: dict[str, Any], plan: str) -> Arm:
    where = f"{plan}, arm {name}"
    usable = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
    _expect(bool(usable), where, "a name of letters, digits, - and _", name)
    _check_keys(content, {"recipe", "title", "seeds"}, {"with", "random_gpt2", "expected_flops"}, where)
    _check_file(content["recipe"], f"{where}, recipe")
    title, seeds, shape = content["title"], content["seeds"], content.get("random_gpt2")
    _expect(isinstance(title, str) and len(title.splitlines()) == 1, f"{where}, title", "one line of text", title)
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    _expect(whole and bool(seeds), f"{where}, seeds", "a list of whole numbers from 0 to 2**32 - 1", seeds)
    _expect(len(set(seeds)) == len(seeds), f"{where}, seeds", "each seed once", seeds)
    drawn = shape is None or re.fullmatch(r"[1-9]\d*x[1-9]\d*", str(shape))
    _expect(bool(drawn), f"{where}, random_gpt2", "LAYERSxWIDTH such as 6x256", shape)
    flops = content.get("expected_flops")
    _expect(flops is None or (type(flops) is float and flops > 0), f"{where}, expected_flops", "a number", flops)
    return Arm(name, content["recipe"], title, tuple(seeds), shared | _read_fields(content, where), shape, flops)


def _read_fields(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    given, where = content.get("with", {}), f"{where}, with"
    _expect(isinstance(given, dict), where, "a mapping", given)
    unknown = [name for name in given if name not in RECIPE_FIELDS - SET_BY_PLAN]
    _expect(not unknown, where, f"fields of a recipe other than {', '.join(sorted(SET_BY_PLAN))}", unknown)
    for name, value in given.items():
        parts = value if isinstance(value, list) else [value]
        plain = bool(parts) and all(isinstance(part, (str, bool, int, float)) for part in parts)
        _expect(plain, f"{where}, {name}", "text, a number, true, false or a list of them", value)
    return given


def _read(path: Path) -> dict[str, Any]:
    try:
        return _take_recipe(["--config", str(path)])
    except (UserError, OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"expected a YAML mapping in {path}, found: {' '.join(str(error).split())}") from error


def _check_keys(content: object, required: set[str], optional: set[str], where: str) -> None:
    _expect(isinstance(content, dict), where, "a mapping", content)
    unknown = [name for name in content if name not in required | optional]
    _expect(not unknown, where, f"no keys but {', '.join(sorted(required | optional))}", unknown)
    _expect(required <= set(content), where, f"the keys {', '.join(sorted(required))}", list(content))


def _check_file(name: object, where: str) -> None:
    _expect(isinstance(name, str) and Path(name).is_file(), where, "an existing file", name)


def _expect(holds: bool, where: str, expected: str, found: object) -> None:
    if not holds:
        raise UserError(f"{where}: expected {expected}, found {found!r}")


def command(plan: Plan, run: Run, output_dir: Path, extra: Sequence[str] = ()) -> list[str]:
    """The words that train a run into `output_dir/RUN`; `extra` ones come last, so that they win."""
    given = dict(run.arm.fields)
    if run.arm.random_gpt2:
        given["model_name_or_path"] = str(_random_model(run, output_dir))
    words = [*LAUNCH, "--config_file", plan.accelerate_config, "-m", "reward_recipes.train"]
    words += ["--config", run.arm.recipe, "--seed", str(run.seed), "--output_dir", str(output_dir / run.name)]
    return [*words, *_options(given), *extra]


def _options(given: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in given.items():
        parts = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(part).lower() if isinstance(part, bool) else str(part) for part in parts)]
    return words


def _random_model(run: Run, output_dir: Path) -> Path:
    return output_dir / "models" / f"gpt2-{run.arm.random_gpt2}-{run.seed}"


def reproduce(plan: Plan, runs: Sequence[Run], output_dir: Path, results_dir: Path, extra: Sequence[str] = ()) -> None:
    """Train each run unless it is finished, evaluate it if the plan says so, and collect its small files.

    Args:
        plan: where the runs come from.
        runs: which of its runs, in this order.
        output_dir: each run's folder is `output_dir/RUN`; a run that was interrupted there goes on.
        results_dir: the small files go to `results_dir/PLAN/RUN`, without paths of this machine; the run's checkpoints
            are deleted then.
        extra: more words for each training.

    Raises:
        UserError: a training or evaluation failed; the runs before it are done.
    """
    for run in runs:
        folder = output_dir / run.name
        trained = _train(plan, run, output_dir, extra)
        if plan.evaluate and not all((folder / name).is_file() for name in hub.REPORT):
            _evaluate(run, folder)
        target = results_dir / plan.name / run.name
        _collect(folder, target)
        record = _record(plan, run, command(plan, run, Path(), extra), folder)
        if not trained and (target / RUN).is_file():  # the words that trained it then, not those of today
            record["command"] = _read(target / RUN).get("command", record["command"])
        output.save_json(target / RUN, record)
        for checkpoint in checkpoints(folder):
            shutil.rmtree(checkpoint)
        print(f"{run.name}: collected in {target}", flush=True)


def _train(plan: Plan, run: Run, output_dir: Path, extra: Sequence[str]) -> bool:
    """Whether there was anything left to train."""
    folder = output_dir / run.name
    if output.is_finished(folder):
        print(f"{run.name}: finished, not trained again", flush=True)
        return False
    if run.arm.random_gpt2 and "--model_name_or_path" not in extra:
        named = {**_read(Path(run.arm.recipe)), **run.arm.fields}.get("model_name_or_path")
        write_random_gpt2(run.arm.random_gpt2, load_tokenizer(named), _random_model(run, output_dir), run.seed)
    resume = ["--resume_from_checkpoint", "true"] if (folder / output.RECIPE).is_file() else []
    words = command(plan, run, output_dir, [*resume, *extra])
    print(f"{run.name}: {shlex.join(words)}", flush=True)
    with _interrupts_left_to_the_run():
        _execute([*LAUNCH_HERE, *words[len(LAUNCH) :]], run, "training")
    return True


@contextmanager
def _interrupts_left_to_the_run() -> Iterator[None]:
    """Ctrl-C reaches every process in the terminal: launcher and parent wait while training saves a checkpoint."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher inherits it, training listens all the same
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluate(run: Run, folder: Path) -> None:
    recipe = _read(folder / output.RECIPE)
    words = ["--model_name_or_path", str(folder), "--output_dir", str(folder)]
    words += _options({name: recipe[name] for name in EVALUATED_ON if name in recipe})
    print(f"{run.name}: evaluating", flush=True)
    _execute([sys.executable, "-m", "reward_recipes.evaluate", *words], run, "evaluation")


def _execute(words: list[str], run: Run, what: str) -> None:
    status = subprocess.run(words, check=False).returncode
    if status:
        raise UserError(
            f"{run.name}: expected its {what} to end well, found exit status {status}, see above; mend that, then give "
            "the same command again: finished runs are skipped, an interrupted one goes on"
        )


def _collect(folder: Path, target: Path) -> None:
    scrubber = Scrubber(folder)
    target.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in COLLECTED):
        if path.is_file():
            fit = hub.fit_for_all(path, scrubber)
            with replacing(target / path.name) as partial:
                shutil.copyfile(path, partial) if fit is None else partial.write_text(fit, "utf-8")


def _record(plan: Plan, run: Run, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `run.json` says; of a command's paths only those that lead into this repository are kept whole."""
    scrubber = Scrubber(folder)
    kept = {name for name in (plan.accelerate_config, run.arm.recipe) if _leads_inside(Path(name))}
    shown = shlex.join(word if word in kept else scrubber.text(word) for word in words)
    return {"arm": run.arm.name, "seed": run.seed, "title": run.arm.title, "command": shown}


def _leads_inside(path: Path) -> bool:
    return not path.is_absolute() and ".." not in path.parts


def _chosen(plan: Plan, only: Sequence[str] | None) -> list[Run]:
    runs = plan.runs()
    known = {name for run in runs for name in (run.arm.name, run.name)}
    unknown = [name for name in only or [] if name not in known]
    _expect(not unknown, "only", f"names of {', '.join(sorted(known))}", unknown)
    return [run for run in runs if not only or {run.arm.name, run.name} & set(only)]


def main() -> None:
    """Read the plan, then carry it out or print its commands."""
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    (arguments,) = parse_arguments([ReproduceArguments], sys.argv[1:place])
    plan, extra = read_plan(Path(arguments.plan)), sys.argv[place + 1 :]
    runs, output_dir = _chosen(plan, arguments.only), Path(arguments.output_dir or f"outputs/{plan.name}")
    if not arguments.dry_run:
        reproduce(plan, runs, output_dir, Path(arguments.results_dir), extra)
        return
    for run in runs:
        print(shlex.join(command(plan, run, output_dir, extra)))


if __name__ == "__main__":
    run_cli(main)
