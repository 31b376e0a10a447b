"""Whole runs under an engine that Accelerate launched on two processes: packed, stopped and resumed, LoRA, bf16."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import training_args
from two_process_script import stopped_and_resumed
from whole_runs import run, sketched_pictures


def let_fsdp_run_on_a_cpu() -> None:
    """Accelerate turns to FSDP from a list of kinds of processes in which CPUs are missing."""
    init = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        new = AcceleratorState._shared_state in ({}, PartialState._shared_state)
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if new and fsdp_plugin is not None and self.num_processes > 1:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


@contextmanager
def precision(name: str) -> Iterator[None]:
    """As if Accelerate had been launched with that `mixed_precision`."""
    before = os.environ["ACCELERATE_MIXED_PRECISION"]
    os.environ["ACCELERATE_MIXED_PRECISION"] = name
    try:
        yield
    finally:
        os.environ["ACCELERATE_MIXED_PRECISION"] = before


def main(folder: Path, command: list[str]) -> None:
    """Train in the same processes, one run after another."""
    let_fsdp_run_on_a_cpu()
    training_args.is_torch_bf16_gpu_available = lambda: True  # asked of a CPU, which can

    def into(name: str, *more: str) -> list[str]:
        return [*command, *more, "--output_dir", str(folder / name)]

    lora = ("--use_peft", "true", "--lora_target_modules", "c_attn")
    kinds = os.environ.get("KINDS", "whole stopped lora bf16").split()
    with sketched_pictures():
        with precision("no"):
            if "whole" in kinds:
                run(*into("whole", "--save_state_dict", "true"))
            if "stopped" in kinds:
                stopped_and_resumed(into("stopped"))
            if "lora" in kinds:
                run(*into("lora", *lora))
        if "bf16" in kinds:
            run(*into("bf16"))  # in what the shipped configuration says
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
