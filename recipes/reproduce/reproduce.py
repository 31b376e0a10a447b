"""How a plan of runs becomes results: trained, evaluated and collected in turn.

Run it as `python recipes/reproduce/reproduce.py`. All words behind a bare `--` go to every training run as they are:
`-- --use_cpu true`, or a stand-in model.
"""

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from plan import RUN, Plan, Run, read_plan
from trl import ModelConfig, ScriptArguments

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.pairs import load_tokenizer
from reward_recipes.push import Scrubber
from reward_recipes.run import (
    UserError,
    check_types,
    checkpoints,
    output,
    parse_arguments,
    read_mapping,
    replacing,
    run_cli,
)
from reward_recipes.score import write_random_gpt2

LAUNCH = ["accelerate", "launch"]
# The same without a PATH, and without the launcher's own traceback below a run's error.
LAUNCH_HERE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
SET_BY_PLAN = {"output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir"}
RECIPE_FIELDS = {
    spec.name for part in (ScriptArguments, RewardRecipeConfig, ModelConfig) for spec in fields(part) if spec.init
}
EVALUATED_ON = ("dataset_name", "dataset_config", "dataset_data_dirs", "dataset_test_split")


@dataclass
class ReproduceArguments:
    """Which plan, and where to. Raises `UserError` for a value of another type than its field's."""

    plan: str = field(metadata={"help": "Plan file, such as recipes/reproduce/full.yaml."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the runs. Default: outputs/PLAN."})
    results_dir: str = field(default="results", metadata={"help": "The runs' small files go to PLAN/RUN in here."})
    only: list[str] | None = field(default=None, metadata={"help": "Names of the arms or runs to do. Default: all."})
    dry_run: bool = field(default=False, metadata={"help": "Print the training commands, and run nothing."})

    def __post_init__(self) -> None:
        if isinstance(self.only, str):  # YAML reads one name as no list
            self.only = [self.only]
        check_types(self)


def check_fields(plan: Plan) -> None:
    """Raise `UserError` for an arm that changes what no recipe has or what the plan itself sets."""
    for arm in plan.arms:
        if unknown := [name for name in arm.fields if name not in RECIPE_FIELDS - SET_BY_PLAN]:
            expected = f"fields of a recipe other than {', '.join(sorted(SET_BY_PLAN))}"
            raise UserError(f"{plan.name}.yaml, arm {arm.name}, with: expected {expected}, found {unknown}")


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
        results_dir: the small files go to `results_dir/PLAN/RUN`, without paths of this machine; then the run's
            checkpoints are deleted.
        extra: more words for each training.

    Raises:
        UserError: a training or evaluation failed; the runs before it are done.
    """
    for run in runs:
        folder, target = output_dir / run.name, results_dir / plan.name / run.name
        finished = output.is_finished(folder)
        if finished:
            print(f"{run.name}: finished, not trained again", flush=True)
        else:
            _train(plan, run, output_dir, extra)
        if plan.evaluate and not all((folder / name).is_file() for name in output.REPORT):
            _evaluate(run, folder)
        _collect(folder, target)
        # The record of a finished run holds the words that trained it then.
        if not finished or not (target / RUN).is_file():
            output.save_json(target / RUN, _record(plan, run, folder, extra))
        for checkpoint in checkpoints(folder):
            shutil.rmtree(checkpoint)
        print(f"{run.name}: collected in {target}", flush=True)


def _train(plan: Plan, run: Run, output_dir: Path, extra: Sequence[str]) -> None:
    if run.arm.random_gpt2 and "--model_name_or_path" not in extra:
        named = {**read_mapping(Path(run.arm.recipe)), **run.arm.fields}.get("model_name_or_path")
        write_random_gpt2(run.arm.random_gpt2, load_tokenizer(named), _random_model(run, output_dir), run.seed)
    started = (output_dir / run.name / output.RECIPE).is_file()
    resume = ["--resume_from_checkpoint", "true"] if started else []
    words = command(plan, run, output_dir, [*resume, *extra])
    print(f"{run.name}: {shlex.join(words)}", flush=True)
    # Ctrl-C reaches every process in the terminal: this one and the launcher, which inherits the setting, wait while
    # training, which listens all the same, saves a checkpoint.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _execute([*LAUNCH_HERE, *words[len(LAUNCH) :]], run, "training")
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluate(run: Run, folder: Path) -> None:
    recipe = read_mapping(folder / output.RECIPE)
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
    for path in (folder / name for name in output.PUBLISHED):
        if path.is_file():
            scrubbed = scrubber.fit(path)
            with replacing(target / path.name) as partial:
                shutil.copyfile(path, partial) if scrubbed is None else partial.write_text(scrubbed, "utf-8")


def _record(plan: Plan, run: Run, folder: Path, extra: Sequence[str]) -> dict[str, Any]:
    """What `run.json` says; of the command's paths only those that lead into this repository are kept whole."""
    scrubber = Scrubber(folder)
    named = (plan.accelerate_config, run.arm.recipe)
    kept = [name for name in named if not Path(name).is_absolute() and ".." not in Path(name).parts]
    words = [word if word in kept else scrubber.text(word) for word in command(plan, run, Path(), extra)]
    return {"arm": run.arm.name, "seed": run.seed, "title": run.arm.title, "command": shlex.join(words)}


def main() -> None:
    """Read the plan, then carry it out or print its commands."""
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    (arguments,) = parse_arguments([ReproduceArguments], sys.argv[1:place])
    plan, extra = read_plan(Path(arguments.plan)), sys.argv[place + 1 :]
    check_fields(plan)
    runs, output_dir = plan.runs(arguments.only or ()), Path(arguments.output_dir or f"outputs/{plan.name}")
    if not arguments.dry_run:
        reproduce(plan, runs, output_dir, Path(arguments.results_dir), extra)
        return
    for run in runs:
        print(shlex.join(command(plan, run, output_dir, extra)))


if __name__ == "__main__":
    run_cli(main)
