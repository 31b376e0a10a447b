"""A plan of runs is trained, evaluated and collected as it says, goes on where it stopped, and names each mistake.

Models and pairs are tiny stand-ins.
"""

import gc
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import reproduce
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import hh_pairs, write_jsonl
from plan import read_plan
from whole_runs import assert_same_run, counted, in_child

from reward_recipes.config import parse_recipe
from reward_recipes.evaluate import evaluation
from reward_recipes.pairs import load_tokenizer
from reward_recipes.run import UserError, run_cli
from reward_recipes.score import write_random_gpt2

ROOT = Path(__file__).resolve().parents[2]
ONE_EPOCH, FINDINGS = (f"recipes/gpt2-small/hh-rlhf/{name}.yaml" for name in ("one_epoch", "findings"))
COLLECTED = {
    *("recipe.yaml", "reward_model_log.csv", "training_progress.png", "data_audit.json", "test_metrics.json"),
    *("test_scores.csv", "run_summary.json", "evaluation.json", "evaluation.md", "evaluation.png", "run.json"),
}
TINY = {"dataset_data_dirs": ["one"], "max_length": 128, "max_steps": 8, "learning_rate": 1.0e-3, "bf16": False}
TINY |= {"logging_steps": 2, "eval_steps": 4, "train_probe_size": 8, "validation_fraction": 0.2}
TINY |= {"per_device_train_batch_size": 4, "save_steps": 4}
pytestmark = pytest.mark.usefixtures("sketched")


class Children:
    """In the place of `subprocess.run`: carries commands out in forks, which need not import torch and TRL again.

    `done` holds the modules that ran, `printed` all that they printed; a training step with the number `kill_in`, from
    0, kills its process.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self.printed = ""
        self.kill_in: int | None = None

    def run(self, words: list[str], check: bool) -> subprocess.CompletedProcess:
        module, words = words[2], words[3:]
        assert importlib.util.find_spec(module)
        if module == "accelerate.commands.launch":
            launched = launch_command_parser().parse_args(words)
            assert launched.module and launched.quiet and Path(launched.config_file).is_file()
            module, words = launched.training_script, launched.training_script_args
        name = module.removeprefix("reward_recipes.")

        def kill(step: int, event: int) -> None:
            if step == self.kill_in:
                os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            gc.freeze()  # a collection would copy all that the fork shares
            sys.argv, evaluation.draw_report = [module, *words], lambda report, path: path.touch()
            with nullcontext() if self.kill_in is None else counted("step", kill):
                run_cli(importlib.import_module(f"{module}.__main__" if name == "evaluate" else module).main)

        status, printed = in_child(work)
        self.done.append(name)
        self.printed += printed
        return subprocess.CompletedProcess(words, status)


@pytest.fixture(scope="module", autouse=True)
def at_root() -> Iterator[None]:
    """Commands are given in the repository's root."""
    with chdir(ROOT):
        yield


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    forks = Children()
    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=forks.run))
    return forks


@pytest.fixture(scope="module")
def plan(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One arm from the tiny model, another from random weights."""
    folder = tmp_path_factory.mktemp("plans")
    write_jsonl(folder / "pairs" / "one" / "train.jsonl", hh_pairs(40))
    write_jsonl(folder / "pairs" / "one" / "test.jsonl", hh_pairs(12, start=100))
    study = {"recipe": FINDINGS, "title": "The study", "seeds": [2], "random_gpt2": "1x64", "with": {"max_steps": 4}}
    content = {
        "accelerate_config": "accelerate_configs/cpu.yaml",
        "with": {"model_name_or_path": str(gpt2_dir), "dataset_name": str(folder / "pairs"), **TINY},
        "arms": {"recommended": {"recipe": ONE_EPOCH, "title": "One epoch", "seeds": [42]}, "study": study},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "tiny.yaml"


def carry_out(plan: Path, folder: Path, *words: str) -> None:
    """The command line, in this process."""
    where = ["--plan", str(plan), "--output_dir", str(folder / "out"), "--results_dir", str(folder / "results")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reproduce", *where, *words])
        reproduce.main()


@pytest.fixture(scope="module")
def done(plan: Path, sketched: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan, carried out: `out` and `results`."""
    folder, forks = tmp_path_factory.mktemp("done"), Children()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "subprocess", SimpleNamespace(run=forks.run))
        carry_out(plan, folder, "--", "--use_cpu", "true")
    assert forks.done == ["train", "evaluate"] * 2, forks.printed[-3000:]
    return folder


def test_each_run_is_trained_evaluated_and_collected(done: Path, gpt2_dir: Path, tmp_path: Path) -> None:
    """Checkpoints go; random weights are those of the seed."""
    results, out = done / "results" / "tiny", done / "out"
    collected = {path.name: {file.name for file in path.iterdir()} for path in results.iterdir()}
    assert collected == dict.fromkeys(("recommended-42", "study-2"), COLLECTED)
    assert json.loads((results / "study-2" / "run.json").read_text()) == {
        "arm": "study",
        "seed": 2,
        "title": "The study",
        "command": "accelerate launch --config_file accelerate_configs/cpu.yaml -m reward_recipes.train "
        f"--config {FINDINGS} --seed 2 --output_dir study-2 --model_name_or_path gpt2-1x64-2 --dataset_name pairs "
        "--dataset_data_dirs one --max_length 128 --max_steps 4 --learning_rate 0.001 --bf16 false --logging_steps 2 "
        "--eval_steps 4 --train_probe_size 8 --validation_fraction 0.2 --per_device_train_batch_size 4 --save_steps 4 "
        "--use_cpu true",
    }
    for run, expected in (("study-2", (2, 4, "gpt2-1x64-2")), ("recommended-42", (42, 8, gpt2_dir.name))):
        recipe = yaml.safe_load((results / run / "recipe.yaml").read_text())
        assert (recipe["seed"], recipe["max_steps"], recipe["model_name_or_path"]) == expected
    report = json.loads((results / "study-2" / "evaluation.json").read_text())
    assert (report["pairs"], report["split"], report["model"], report["dataset"]) == (12, "test", "study-2", "pairs")
    assert not list(out.rglob("checkpoint-*")) and (out / "study-2" / "model.safetensors").is_file()
    used = (out / "models" / "gpt2-1x64-2" / "model.safetensors").read_bytes()
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            write_random_gpt2("1x64", load_tokenizer(str(gpt2_dir)), tmp_path, seed)
        assert ((tmp_path / "model.safetensors").read_bytes() == used) == (seed == 2)
    with pytest.raises(UserError, match=r"random_gpt2: expected LAYERSxWIDTH .*, found"):
        write_random_gpt2("6", load_tokenizer(str(gpt2_dir)), tmp_path, seed=1)
    base = str(tmp_path.parent).encode()  # no file that is collected names this machine
    assert base in (out / "study-2" / "recipe.yaml").read_bytes()
    files = [path for path in (done / "results").rglob("*") if path.is_file()]
    assert not [path for path in files for place in (base, str(ROOT).encode()) if place in path.read_bytes()]


def test_the_same_command_again_trains_nothing_and_restores_what_is_missing(
    done: Path, plan: Path, children: Children, tmp_path: Path
) -> None:
    folder = shutil.copytree(done, tmp_path / "again")
    results = folder / "results" / "tiny" / "study-2"
    (results / "evaluation.md").unlink()
    carry_out(plan, folder, "--only", "study")
    assert not children.done
    assert {path.name: path.read_bytes() for path in results.iterdir()} == {
        path.name: path.read_bytes() for path in (done / "results" / "tiny" / "study-2").iterdir()
    }
    # A run that was trained by hand: no report yet, nothing collected.
    (folder / "out" / "study-2" / "evaluation.png").unlink()
    shutil.rmtree(results)
    carry_out(plan, folder, "--only", "study-2")
    assert children.done == ["evaluate"] and {path.name for path in results.iterdir()} == COLLECTED


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    done: Path, plan: Path, children: Children, tmp_path: Path
) -> None:
    words = ("--only", "recommended", "--", "--use_cpu", "true")
    children.kill_in = 5
    with pytest.raises(UserError, match=r"^recommended-42: expected it to end well .*, found 'exit status -9'"):
        carry_out(plan, tmp_path, *words)
    assert not (tmp_path / "results").exists()
    children.kill_in = None
    carry_out(plan, tmp_path, *words)
    output = tmp_path / "out" / "recommended-42"
    assert f"resuming from {output / 'checkpoint-4'}" in children.printed
    assert_same_run(output, done / "out" / "recommended-42")
    records = [(base / "results/tiny/recommended-42/run.json").read_text() for base in (tmp_path, done)]
    assert records[0] == records[1]


def test_only_and_dry_run(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carry_out(plan, tmp_path, "--dry_run", "true", "--only", "study-2", "recommended", "--", "--max_steps", "3")
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[line.index("--output_dir") + 1] for line in lines] == [
        str(tmp_path / "out" / run) for run in ("recommended-42", "study-2")
    ]
    assert all(line[:2] == ["accelerate", "launch"] and line[-2:] == ["--max_steps", "3"] for line in lines)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"^only: expected names of recommended, .*, study-2, found .*'nothing'"):
        carry_out(plan, tmp_path, "--only", "study", "nothing")


def test_mistakes_in_a_plan(plan: Path, tmp_path: Path) -> None:
    for old, new, told in (
        ("arms:", "other: 1\narms:", "unexpected keyword argument 'other'"),
        ("title: One epoch", "", "missing 1 required.*'title'"),
        ("seeds:\n    - 42", "seeds: 42", "not iterable"),
    ):
        assert old in plan.read_text()
        (tmp_path / "plan.yaml").write_text(plan.read_text().replace(old, new, 1))
        with pytest.raises(UserError, match=f"plan.yaml: expected a plan, found: .*{told}"):
            read_plan(tmp_path / "plan.yaml")


def test_shipped_plans_give_commands_that_training_accepts() -> None:
    plans = {path: read_plan(path) for path in Path("recipes/reproduce").glob("*.yaml")}
    assert len(plans) == 5
    for path, plan in plans.items():
        assert path.read_text().splitlines()[0] == f"# python recipes/reproduce/reproduce.py --plan {path}"
        for run in (run for run in plan.runs() if run.seed == run.arm.seeds[-1]):
            launched = launch_command_parser().parse_args(reproduce.command(plan, run, Path("outputs"), []))
            assert Path(launched.config_file).is_file()
            _, config, *_ = parse_recipe([*launched.training_script_args, "--bf16", "false"])
            assert (config.seed, config.output_dir) == (run.seed, f"outputs/{run.name}")
