"""FSDP2, ZeRO-2 and ZeRO-3 train as one process does, by the shipped configurations, on two CPU processes over gloo.

For each: parameters, log and test figures of a packed run and of LoRA with its merge, `save_state_dict`, an exact
resume, scores in float32 where the weights are bf16. Run by `make test-engines`, which installs DeepSpeed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_script
import pandas as pd
import pytest
import torch
import yaml
from conftest import hh_pairs, write_jsonl
from datasets import load_dataset
from safetensors.torch import load_file
from whole_runs import arguments, assert_same_run, log_of, run

from reward_recipes.score import load_scorer

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("sketched")]

TESTS = Path(__file__).resolve().parents[1]
CONFIGS = TESTS.parent / "accelerate_configs"
ON_A_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
LORA = {"use_peft": True, "lora_target_modules": "c_attn"}
# Shipped configuration: what a CPU needs the recipe to say, which runs it makes, and how the trainer must see it.
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {
        "options": {"use_cpu": True},
        "runs": ["whole", "dropout", "stopped", "lora", "bf16"],
        "seen": {"processes": 2, "type": "FSDP", "split": True, "stage": None},
        "refused": {},
    },
    "deepspeed_zero2": {
        "options": {"use_cpu": False, "ddp_backend": "gloo"},
        "runs": ["whole", "dropout", "stopped", "lora", "bf16", "apart", "clipped"],
        "seen": {"processes": 2, "type": "DEEPSPEED", "split": False, "stage": 2},
        "refused": {
            "apart": "step 8: expected the same weights on all processes, found those of rank 0 unlike those of",
            "clipped": "DeepSpeed's configuration: expected the recipe's values, found ds gradient_clipping=0.5",
        },
    },
    "deepspeed_zero3": {
        "options": {"use_cpu": False, "ddp_backend": "gloo"},
        "runs": ["whole", "dropout", "stopped", "lora", "bf16"],
        "seen": {"processes": 2, "type": "DEEPSPEED", "split": True, "stage": 3},
        "refused": {"lora": "use_peft: expected DDP, FSDP or ZeRO-2, found ZeRO-3"},
    },
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 pairs to train on beside 8 held out, and 40 test pairs, whose scores are many enough to be counted."""
    folder = tmp_path_factory.mktemp("pairs")
    write_jsonl(folder / "train.jsonl", hh_pairs(40))
    write_jsonl(folder / "test.jsonl", hh_pairs(40, start=100))
    return folder


@pytest.fixture(scope="module")
def one(gpt2_dir: Path, pairs: Path, sketched: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one process trains with the same global batch."""
    folder = tmp_path_factory.mktemp("one")
    for name, options in (("whole", {}), ("lora", LORA)):
        run(*arguments(gpt2_dir, pairs, folder / name, disable_dropout=True, **options))
    return folder


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: pytest.FixtureRequest, gpt2_dir: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, str]:
    """The engine's name, the folder of its runs, and what one launch of them all printed. The limit is for a hang."""
    folder, expected = tmp_path_factory.mktemp(request.param), ENGINES[request.param]
    settings = yaml.safe_load((CONFIGS / f"{request.param}.yaml").read_text())
    assert settings["mixed_precision"] == "bf16"
    (folder / "two.yaml").write_text(yaml.safe_dump(settings | {"num_processes": 2}))
    options = expected["options"] | {"per_device_train_batch_size": 2, "disable_dropout": True, "save_state_dict": True}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "two.yaml")]
    launch += ["--main_process_port", "0", engine_script.__file__, ",".join(expected["runs"]), str(folder)]
    done = subprocess.run(
        launch + arguments(gpt2_dir, pairs, folder, **options),
        env=os.environ | ON_A_CPU | {"PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank"))
    return request.param, folder, done.stdout + done.stderr


def test_the_engine_is_the_one_that_was_asked_for(engine: tuple[str, Path, str]) -> None:
    """Accelerate falls back to plain DDP, or to one process, without a word."""
    name, folder, _ = engine
    assert json.loads((folder / "seen.json").read_text()) == ENGINES[name]["seen"]
    summary = json.loads((folder / "whole" / "run_summary.json").read_text())
    assert (summary["processes"], summary["engine"]) == (2, ENGINES[name]["seen"]["type"])


def test_what_an_engine_cannot_do_is_one_line(engine: tuple[str, Path, str]) -> None:
    """An adapter under ZeRO-3; under ZeRO-2 a weight that is another one on one rank, and a setting said two ways.

    The last was to overwrite the run `whole`, which other tests find as it was.
    """
    name, folder, _ = engine
    refused, expected = json.loads((folder / "refused.json").read_text()), ENGINES[name]["refused"]
    assert refused.keys() == expected.keys()
    for kind, text in refused.items():
        assert text.startswith(expected[kind])
    if name == "deepspeed_zero2":
        assert [path.name for path in (folder / "apart").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_two_processes_train_as_one(kind: str, engine: tuple[str, Path, str], one: Path) -> None:
    """2 processes of 2 pairs against 1 of 4: log, best step, weights, the merged ones too, and test scores.

    ZeRO-3 trains unpacked and has no adapters; the single run that it is held to is packed.
    """
    name, folder, printed = engine
    if kind in ENGINES[name]["refused"]:
        assert not (folder / kind).exists()
        return
    assert_same_run(folder / kind, one / kind, tolerance=1e-4)
    tables = [pd.read_csv(path / kind / "test_scores.csv", index_col="row") for path in (folder, one)]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-4)
    packed = json.loads((folder / kind / "run_summary.json").read_text())["cost"]["packed"]
    assert packed == (name != "deepspeed_zero3")
    assert ("pairs are not packed" in printed) != packed


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_the_folder_scores_as_the_run_did(kind: str, engine: tuple[str, Path, str], pairs: Path) -> None:
    """Loaded as plain weights; `reward_model.pt` holds the same."""
    name, folder, _ = engine
    if kind in ENGINES[name]["refused"]:
        return
    weights = load_file(folder / kind / "model.safetensors")
    state = torch.load(folder / kind / "reward_model.pt", weights_only=True)
    assert state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)
    rows = load_dataset("json", data_files=str(pairs / "test.jsonl"), split="train")
    table = pd.read_csv(folder / kind / "test_scores.csv")
    scores = load_scorer(str(folder / kind)).score([*rows["chosen"], *rows["rejected"]])
    assert scores == pytest.approx([*table["chosen_score"], *table["rejected_score"]], abs=1e-4)


def test_a_stopped_run_resumes_exactly(engine: tuple[str, Path, str]) -> None:
    """With dropout, so that random states count; the second process gets SIGTERM inside a logging window."""
    _, folder, printed = engine
    assert "stopped by SIGTERM after step 11;" in printed
    assert "accelerate launch --num_processes 2 --config_file ENGINE.yaml -m" in printed
    assert_same_run(folder / "stopped", folder / "dropout")


def test_scores_are_float32_where_weights_are_bf16(engine: tuple[str, Path, str]) -> None:
    """The shipped `mixed_precision: bf16` against a recipe's `bf16: false`; 80 texts, after four steps."""
    _, folder, _ = engine
    table = pd.read_csv(folder / "bf16" / "test_scores.csv")
    scores = torch.tensor([*table["chosen_score"], *table["rejected_score"]])
    rounded = scores.bfloat16().float()
    assert len(scores) == 80 and (scores == rounded).float().mean() < 0.1
    assert len(scores.unique()) == 80 > len(rounded.unique())
    whole = [float(row["train_loss"]) for row in log_of(folder / "whole") if row["train_loss"]]
    found = [float(row["train_loss"]) for row in log_of(folder / "bf16") if row["train_loss"]]
    assert found == pytest.approx(whole, abs=0.02) and found != pytest.approx(whole, abs=1e-5)
