"""What every entry point holds its options to: sources, repositories, devices and processes."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from reward_recipes.run.errors import UserError, expect

# Said by options of their own, or not at all: code of others, pickles, more than one score.
NOT_IN_INIT = ("trust_remote_code", "use_safetensors", "weights_only", "num_labels")


def fit_to_device(config: TrainingArguments) -> None:
    """Fill in what follows from launcher and device: precision unless it is said, progress bars, pinned memory."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched in ("bf16", "fp16") and not (config.bf16 or config.fp16):
        setattr(config, launched, True)  # it holds anyway, and DeepSpeed asks both to say the same
    if config.bf16 is None and not config.fp16:
        on_gpu = torch.cuda.is_available() and not config.use_cpu
        config.bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.disable_tqdm is None:
        config.disable_tqdm = bool(os.environ.get("CI"))
    config.dataloader_pin_memory = config.dataloader_pin_memory and torch.accelerator.is_available()


def check_processes() -> None:
    """Raise `UserError` where each process of a launch would train on its own, into the same folder."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != PartialState().num_processes:
        raise UserError(
            f"expected the {launched} launched processes to train together, found each on its own; without GPUs add "
            "--use_cpu true"
        )


@contextmanager
def renamed_fields_unwarned() -> Iterator[None]:
    """TRL itself sets `gradient_checkpointing`, whose name is an old one for transformers >= 5.23, at every start."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
        yield


def check_source(name: str, value: str | Path) -> None:
    """Hold what is called `name` to a path that is there, or what can be a hub id; raises `UserError` otherwise."""
    try:
        if not str(value).strip() or not Path(value).expanduser().exists():
            validate_repo_id(str(value))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{name}: expected a hub id or a path that is there, found nothing at {str(value)!r:.300}; paths begin at "
            "the current folder"
        ) from error


def check_repo_id(name: str, value: str | None) -> None:
    """Hold the option called `name` to `user/name`, the id of a repository; raises `UserError` for anything else."""
    try:
        validate_repo_id(value)
        valid = value is not None and "/" in value
    except HFValidationError:
        valid = False
    expect(valid, name, "user/name", value)


def repeated_pairs(pairs: int, batch_size: int, processes: int) -> int:
    """How many pairs Accelerate repeats in an epoch, so that several processes have equally many full batches."""
    return -pairs % (batch_size * processes) if processes > 1 else 0


def check_hub_fields(config: TrainingArguments) -> None:
    """Hold `push_to_hub` and `hub_model_id` to each other; raises `UserError` where one lacks the other."""
    if config.push_to_hub:
        check_repo_id("hub_model_id", config.hub_model_id)
    elif config.hub_model_id is not None:
        raise UserError(f"hub_model_id={config.hub_model_id!r} would have no effect; set push_to_hub, or remove it")


def check_model_init(options: object) -> None:
    """Hold `model_init_kwargs` to what may be said there: nothing that lets code of others run."""
    expect(isinstance(options, dict), "model_init_kwargs", "a mapping", options)
    for name in NOT_IN_INIT:
        expect(name not in options, "model_init_kwargs", f"no {name}", options.get(name))
