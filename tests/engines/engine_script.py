"""Whole runs, one after another, under an engine that Accelerate launched on two CPU processes."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import training_args
from two_process_script import stopped_and_resumed, with_a_changed_replica
from whole_runs import before_calls, run, sketched_pictures

from reward_recipes.run import UserError
from reward_recipes.trainer import ExactRewardTrainer

LORA = ("--use_peft", "true", "--lora_target_modules", "c_attn")
DROPOUT = ("--disable_dropout", "false")


def with_another_clipping(command: list[str]) -> None:
    """A configuration that clips gradients otherwise than the recipe, over the run that is there."""
    os.environ["ACCELERATE_GRADIENT_CLIPPING"] = "0.5"
    run(*command, "--overwrite_output_dir", "true", "--output_dir", str(Path(command[-1]).with_name("whole")))


KINDS: dict[str, tuple[Callable[[list[str]], None], tuple[str, ...]]] = {
    "whole": (lambda command: run(*command), ()),
    "dropout": (lambda command: run(*command), DROPOUT),
    "stopped": (stopped_and_resumed, DROPOUT),
    "lora": (lambda command: run(*command), LORA),
    "bf16": (lambda command: run(*command), ()),
    "apart": (with_a_changed_replica, ()),
    "clipped": (with_another_clipping, ()),
}


def let_engines_run_on_a_cpu() -> None:
    """Accelerate turns to FSDP from a list of kinds of processes that lacks CPUs; transformers asks GPUs about bf16."""
    init = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        new = AcceleratorState._shared_state in ({}, PartialState._shared_state)
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if new and fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp
    training_args.is_torch_bf16_gpu_available = lambda: True


def note_engine(seen: dict[str, Any], call: int, trainer: ExactRewardTrainer, *args: object) -> None:
    """Fill in what the trainer runs on when it saves a checkpoint."""
    split = [hasattr(weights, "to_local") or hasattr(weights, "ds_id") for weights in trainer.model.parameters()]
    stage = trainer.deepspeed.zero_optimization_stage() if trainer.is_deepspeed_enabled else None
    seen.update(processes=trainer.accelerator.num_processes, type=trainer.accelerator.distributed_type.value)
    seen.update(split=any(split), stage=stage)


def main(kinds: list[str], folder: Path, command: list[str]) -> None:
    """Train in the same processes, all kinds in float32 but bf16, which takes the configuration as it was shipped."""
    let_engines_run_on_a_cpu()
    seen: dict[str, Any] = {}
    refused: dict[str, str] = {}
    shipped = os.environ["ACCELERATE_MIXED_PRECISION"]
    noting = before_calls(ExactRewardTrainer, "_save_checkpoint", partial(note_engine, seen))
    with sketched_pictures(), noting:
        for kind in kinds:
            os.environ["ACCELERATE_MIXED_PRECISION"] = shipped if kind == "bf16" else "no"
            work, options = KINDS[kind]
            try:
                work([*command, *options, "--output_dir", str(folder / kind)])
            except UserError as error:
                refused[kind] = str(error)
    if PartialState().is_main_process:
        (folder / "seen.json").write_text(json.dumps(seen))
        (folder / "refused.json").write_text(json.dumps(refused))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1].split(","), Path(sys.argv[2]), sys.argv[3:])
