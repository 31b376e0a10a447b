"""What every entry point holds its options to: sources, repositories, devices and processes."""

import ctypes
import os
import sys
from dataclasses import fields, replace
from os import PathLike
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import AcceleratorConfig

from reward_recipes.early import find_missing
from reward_recipes.run.errors import UserError, expect

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h

# Refused in model_init_kwargs: they run foreign code, read pickles, or change the number of scores.
NOT_IN_INIT = ("trust_remote_code", "use_safetensors", "weights_only", "num_labels")

# Accepted by TRL's or transformers' dataclasses but without effect here; silence would mislead. Each has its way out.
NOT_HONOURED = {
    "dataset_streaming": "remove it: pairs are read, audited and cached as a whole",
    "ignore_bias_buffers": "remove it: current models have no such buffers",
    **dict.fromkeys(
        ("prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches", "include_for_metrics"),
        "remove it: metrics are computed from all scores",
    ),
    "dataloader_drop_last": "remove it: it would leave pairs out of the figures",
    "dataloader_in_order": "remove it: a score is known by its place",
    "pad_to_multiple_of": "remove it: a batch is as wide as its longest text or packed row",
    "pad_token": "set the pad token in the tokenizer's own folder",
    **dict.fromkeys(("hub_always_push", "hub_strategy"), "remove it: the run is pushed once, when it is finished"),
    "hub_revision": "remove it: the run is pushed to the main branch",
    "enable_jit_checkpoint": "remove it: a signal saves a checkpoint anyway",
    "restore_callback_states_from_checkpoint": "remove it: a resumed run restores what it needs",
    "logging_strategy": "set logging_steps: the log has a row every so many steps",
    "save_only_model": "remove it: a run cannot be resumed without its optimizer",
    "auto_find_batch_size": "set per_device_train_batch_size: a retry would mix two attempts' figures",
    **dict.fromkeys(("fp16_full_eval", "bf16_full_eval"), "remove it: it casts the model that is then saved"),
}


def refuse_without_effect(part: Any) -> None:
    """Raise `UserError`, with the way out, for a field that TRL knows and that was given, but does nothing here."""
    for spec in fields(part):
        value = getattr(part, spec.name)
        if spec.name in NOT_HONOURED and value not in (None, [], spec.default):
            raise UserError(f"{spec.name}={value!r} would have no effect; {NOT_HONOURED[spec.name]}")


def fit_to_device(config: TrainingArguments) -> None:
    """Fill in what follows from launcher and device: precision unless it is said, progress bars, pinned memory.

    A schedule that waits for the metric gets its direction.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched in ("bf16", "fp16") and not (config.bf16 or config.fp16):
        setattr(config, launched, True)  # it holds anyway, and DeepSpeed asks both to say the same
    if config.bf16 is None and not config.fp16:
        on_gpu = torch.cuda.is_available() and not config.use_cpu
        config.bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.disable_tqdm is None:
        config.disable_tqdm = bool(os.environ.get("CI"))
    if config.lr_scheduler_type == "reduce_lr_on_plateau" and not config.lr_scheduler_kwargs:
        config.lr_scheduler_kwargs = {"mode": "max" if config.greater_is_better else "min"}
    config.dataloader_pin_memory = config.dataloader_pin_memory and torch.accelerator.is_available()
    keep_freed_memory()


def keep_freed_memory() -> None:
    """On a CPU, have the C library reuse freed memory, which it would return to the kernel and request anew each step.

    The process then keeps the memory of its peak until it ends. Nothing happens beside a GPU, where models pass through
    the memory only once, and with a C library that has no `mallopt`.
    """
    if sys.platform == "linux" and not torch.accelerator.is_available():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *setting: None)
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap,
        mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never returned


def check_accelerator(settings: AcceleratorConfig) -> None:
    """Refuse, by name, settings of Accelerate under which packed batches would be torn apart."""
    expected = "false, because each process makes its own batches"
    for name in ("dispatch_batches", "split_batches"):
        expect(not getattr(settings, name), f"accelerator_config: {name}", expected, True)


def fit_engine(accelerator: Accelerator) -> None:
    """Let FSDP2 return float32 scores, and hold DeepSpeed's settings to the recipe's, before the model is prepared.

    In bf16 Accelerate tells FSDP2 to cast what each module returns, the scores among it. Raises `UserError` where
    DeepSpeed's configuration says otherwise than the recipe.
    """
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(fsdp, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        fsdp.mixed_precision_policy = replace(policy, output_dtype=None)
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if mismatches := getattr(getattr(deepspeed, "hf_ds_config", None), "mismatches", None):
        found = "; ".join(line.removeprefix("- ") for line in mismatches)
        raise UserError(f"DeepSpeed's configuration: expected the recipe's values, found {found}; write \"auto\" there")


def check_processes(use_peft: bool = False, gpus: int = 1) -> None:
    """Raise `UserError` where processes would train each on their own, split batches, or could merge no adapter."""
    if gpus > 1:  # Trainer would split the rows of a batch over them, and their pairs' bookkeeping with them
        raise UserError(
            f"expected one GPU a process, found {gpus} in one; start as many processes with accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if use_peft and is_deepspeed_zero3_enabled():
        raise UserError("use_peft: expected DDP, FSDP or ZeRO-2, found ZeRO-3, where an adapter cannot be merged")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != PartialState().num_processes:
        raise UserError(
            f"expected the {launched} launched processes to train together, found each on its own; without GPUs add "
            "--use_cpu true"
        )


def join_processes() -> PartialState:
    """Join the processes of a launch for work that they share, on CPUs where there is no GPU; raises as above."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu)
    check_processes()
    return state


def check_source(name: str, value: str | PathLike[str]) -> None:
    """Hold what is called `name` to a path that is there, or what can be a hub id; raises `UserError` otherwise."""
    if missing := find_missing(name, value):
        raise UserError(missing)


def check_repo_id(name: str, value: str | None) -> None:
    """Hold the option called `name` to `user/name`, the id of a repository; raises `UserError` for anything else."""
    try:
        validate_repo_id(value)
        valid = "/" in (value or "")
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
