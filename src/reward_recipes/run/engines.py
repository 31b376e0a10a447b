"""What engines that split a model over processes are held to: the recipe's settings, exact scores, equal replicas."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object
from transformers.integrations import is_deepspeed_zero3_enabled

from reward_recipes.run.errors import UserError
from reward_recipes.run.finite import NotFinite, latest_checkpoint, require_finite_weights


def fit_engine(accelerator: Accelerator) -> None:
    """Let FSDP2 return float32 scores, and hold DeepSpeed's settings to the recipe's, before the model is prepared.

    In bf16 Accelerate tells FSDP2 to cast what each module returns, the scores among it.

    Raises:
        UserError: DeepSpeed's configuration says otherwise than the recipe.
    """
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(fsdp, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        fsdp.mixed_precision_policy = replace(policy, output_dtype=None)
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if mismatches := getattr(getattr(deepspeed, "hf_ds_config", None), "mismatches", None):
        found = "; ".join(line.removeprefix("- ") for line in mismatches)
        raise UserError(f"DeepSpeed's configuration: expected the recipe's values, found {found}; write \"auto\" there")


def require_sound_weights(model: torch.nn.Module, step: int, output_dir: Path) -> None:
    """Raise `NotFinite`, on all processes, unless trained weights are finite and all replicas hold the same.

    Engines that shard the weights (FSDP, ZeRO-3) have no replicas to compare. The model is not wrapped.
    """
    require_finite_weights(model, step, output_dir)
    state = PartialState()
    if state.num_processes == 1 or state.distributed_type == DistributedType.FSDP or is_deepspeed_zero3_enabled():
        return
    ranks: dict[str, list[str]] = {}
    for rank, digest in enumerate(gather_object([_digest(model)])):
        ranks.setdefault(digest, []).append(str(rank))
    if len(ranks) > 1:
        kinds = " unlike ".join(f"those of rank {', '.join(each)}" for each in sorted(ranks.values(), key=len))
        raise NotFinite(
            f"step {step}: expected the same weights on all processes, found {kinds}; {latest_checkpoint(output_dir)}; "
            "look at those devices, then resume"
        )


def _digest(model: torch.nn.Module) -> str:
    """A hash of the weights that are trained; the others were the same at the start, and stay so."""
    found = hashlib.sha256()
    for weights in model.parameters():
        if weights.requires_grad:
            found.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
