"""How a plan of runs becomes results: trained, evaluated and collected in turn.

Run it as `python recipes/reproduce/reproduce.py`. All words behind a bare `--` go to every training run as they are:
`-- --use_cpu true`, or a stand-in model.
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plan import Plan, Run, read_plan

from reward_recipes.pairs import load_tokenizer
from reward_recipes.push import Scrubber
from reward_recipes.run import expect, output, read_mapping, run_cli, save_json, saved
from reward_recipes.score import write_random_gpt2

# `accelerate launch` without a PATH, and without the launcher's own traceback below a run's error.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
RUN = "run.json"  # beside a collected run: its arm, seed, title and command
EVALUATED_ON = ("dataset_name", "dataset_config", "dataset_data_dirs", "dataset_test_split")


def command(plan: Plan, run: Run, output_dir: Path, extra: Sequence[str] = ()) -> list[str]:
    """The words behind `accelerate launch` that train a run into `output_dir/RUN`; `extra` ones, last, win."""
    given = dict(run.arm.changes)
    if run.arm.random_gpt2:
        given["model_name_or_path"] = str(_random_model(run, output_dir))
    words = ["--config_file", plan.accelerate_config, "-m", "reward_recipes.train", "--config", run.arm.recipe]
    words += ["--seed", str(run.seed), "--output_dir", str(output_dir / run.name)]
    return [*words, *_options(given), *extra]


def _options(given: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in given.items():
        parts = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(part if isinstance(part, str) else json.dumps(part) for part in parts)]
    return words


def _random_model(run: Run, output_dir: Path) -> Path:
    return output_dir / "models" / f"gpt2-{run.arm.random_gpt2}-{run.seed}"


def _launched(words: Sequence[str]) -> str:
    return shlex.join(["accelerate", "launch", *words])


def reproduce(plan: Plan, runs: Sequence[Run], output_dir: Path, results_dir: Path, extra: Sequence[str] = ()) -> None:
    """Train each run unless it is finished, evaluate it if the plan says so, and collect its small files.

    A run's folder is `output_dir/RUN`; one that was interrupted there goes on. Its small files go to
    `results_dir/PLAN/RUN`, without paths of this machine; then its checkpoints are deleted. `extra` words go to each
    training. Raises `UserError` where a training or evaluation failed; the runs before it are done.
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
        # The record of a run that was finished before holds the words that trained it then.
        _collect(plan, run, folder, target, None if finished and (target / RUN).is_file() else extra)
        for each in saved(folder):
            shutil.rmtree(each)
        print(f"{run.name}: collected in {target}", flush=True)


def _train(plan: Plan, run: Run, output_dir: Path, extra: Sequence[str]) -> None:
    if run.arm.random_gpt2 and "--model_name_or_path" not in extra:
        named = (read_mapping(Path(run.arm.recipe)) | run.arm.changes).get("model_name_or_path")
        write_random_gpt2(run.arm.random_gpt2, load_tokenizer(named), _random_model(run, output_dir), run.seed)
    words = command(plan, run, output_dir, ["--resume_from_checkpoint", "true", *extra])
    print(f"{run.name}: {_launched(words)}", flush=True)
    # Ctrl-C reaches every process in the terminal: this one and the launcher, which inherits the setting, wait while
    # training, which listens all the same, saves a checkpoint.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _execute([*LAUNCH, *words], run)
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluate(run: Run, folder: Path) -> None:
    recipe = read_mapping(folder / output.RECIPE)
    words = ["--model_name_or_path", str(folder), "--output_dir", str(folder)]
    words += _options({name: recipe[name] for name in EVALUATED_ON if name in recipe})
    print(f"{run.name}: evaluating", flush=True)
    _execute([sys.executable, "-m", "reward_recipes.evaluate", *words], run)


def _execute(words: list[str], run: Run) -> None:
    status = subprocess.run(words, check=False).returncode
    expected = "it to end well (see above; mend that and give the same command again)"
    expect(status == 0, run.name, expected, f"exit status {status}")


def _collect(plan: Plan, run: Run, folder: Path, target: Path, extra: Sequence[str] | None) -> None:
    """Copy a run's small files, without this machine's paths; write the record of one that `extra` words trained."""
    scrubber = Scrubber(folder)
    target.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in output.PUBLISHED if (folder / name).is_file()):
        scrubbed = scrubber.fit(path)
        (target / path.name).write_bytes(path.read_bytes() if scrubbed is None else scrubbed.encode())
    if extra is not None:
        # Of the command's paths only those that lead into this repository are kept whole.
        kept = [name for name in (plan.accelerate_config, run.arm.recipe) if not name.startswith(("/", ".."))]
        words = [word if word in kept else scrubber.text(word) for word in command(plan, run, Path(), extra)]
        record = {"arm": run.arm.name, "seed": run.seed, "title": run.arm.title, "command": _launched(words)}
        save_json(target / RUN, record)


def main() -> None:
    """Read the plan, then carry it out or print its commands."""
    parser = argparse.ArgumentParser(description="Train, evaluate and collect the runs of a plan.")
    parser.add_argument("--plan", type=Path, required=True, help="plan file, such as recipes/reproduce/full.yaml")
    parser.add_argument("--output_dir", type=Path, help="folder of the runs (default outputs/PLAN)")
    parser.add_argument("--results_dir", type=Path, default="results", help="small files go to PLAN/RUN in here")
    parser.add_argument("--only", nargs="+", default=(), help="names of the arms or runs to do (default all)")
    parser.add_argument("--dry_run", nargs="?", const="true", default="false", choices=("true", "false"))
    parser.add_argument("extra", nargs="*", help="behind --: more words for every training run")
    args = parser.parse_args()
    plan = read_plan(args.plan)
    runs, output_dir = plan.runs(args.only), args.output_dir or Path("outputs", plan.name)
    if args.dry_run == "true":
        print("\n".join(_launched(command(plan, run, output_dir, args.extra)) for run in runs))
    else:
        reproduce(plan, runs, output_dir, args.results_dir, args.extra)


if __name__ == "__main__":
    run_cli(main)
