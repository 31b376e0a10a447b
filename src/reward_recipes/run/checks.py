"""What every entry point holds its options to: sources, folders, repositories, devices and processes."""

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

# What decides whether code of others may run is said by name, or not at all.
NOT_IN_INIT = {
    "trust_remote_code": "which is an option of its own",
    "use_safetensors": "since weights are read from safetensors alone",
    "weights_only": "since weights are read from safetensors alone",
}


def fit_to_device(config: TrainingArguments) -> None:
    """Fill in what follows from the device: bf16 unless it is said, progress bars, pinned memory."""
    if config.bf16 is None and not config.fp16:
        on_gpu = torch.cuda.is_available() and not config.use_cpu
        config.bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.disable_tqdm is None:
        config.disable_tqdm = bool(os.environ.get("CI"))
    config.dataloader_pin_memory = config.dataloader_pin_memory and torch.accelerator.is_available()


def check_processes() -> None:
    """Hold the processes of a launch to training together.

    Raises:
        UserError: each would train on its own, into the same folder.
    """
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


def _is_usable_folder(name: str | None) -> bool:
    """Whether a folder's name, if there is one, can be one, and is not the root of the file system."""
    try:
        path = Path(name or ".").resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError):  # too long; links in a ring; a NUL
        return False
    return name is None or (bool(name.strip()) and path != path.parent)


def check_output_dir(name: str | None) -> None:
    """Hold `output_dir` to what can be a run's folder; raises `UserError` for anything else."""
    expect(_is_usable_folder(name), "output_dir", "a folder for this run", name)


def check_source(name: str, value: str | Path) -> None:
    """Hold the option or thing called `name` to a file or folder that is there, or what can be an id on the Hub.

    Raises:
        UserError: it is neither.
    """
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
    except HFValidationError as error:
        raise UserError(f"{name}: expected user/name, found {value!r}: {error}") from error
    expect(value is not None and "/" in value, name, "user/name", value)


def repeated_pairs(pairs: int, batch_size: int, processes: int) -> int:
    """How many pairs Accelerate repeats in an epoch, so that several processes have equally many full batches."""
    return -pairs % (batch_size * processes) if processes > 1 else 0


def check_hub_fields(config: TrainingArguments) -> None:
    """Refuse what would have Trainer push more than this package does: once, when the run is finished."""
    strategy = getattr(config.hub_strategy, "value", config.hub_strategy)
    default = type(config).__dataclass_fields__["hub_strategy"].default
    expect(strategy in (default, "end"), "hub_strategy", "`end`", strategy)
    if config.push_to_hub:
        check_repo_id("hub_model_id", config.hub_model_id)
    elif config.hub_model_id is not None:
        raise UserError(
            f"hub_model_id={config.hub_model_id!r} would have no effect; set push_to_hub to true, or remove it"
        )


def check_model_init(options: object) -> None:
    """Hold `model_init_kwargs` to what may be said there: one score, and nothing that lets code of others run."""
    expect(isinstance(options, dict), "model_init_kwargs", "a mapping", options)
    for name, reason in NOT_IN_INIT.items():
        expect(name not in options, "model_init_kwargs", f"no {name}, {reason}", options.get(name))
    num_labels = options.get("num_labels", 1)
    expect(num_labels == 1, "num_labels", "1, a reward model gives one score", num_labels)
