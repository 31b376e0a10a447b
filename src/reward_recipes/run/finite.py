"""Whether a step's numbers are fit to train on and to save: finite on all processes, and the same in all replicas."""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather, gather_object
from transformers.integrations import is_deepspeed_zero3_enabled

from reward_recipes.run.checkpoints import latest_valid
from reward_recipes.run.errors import UserError


class NotFinite(UserError):
    """A number went bad, on all processes or on one, so the run ended."""


class FiniteSteps:
    """Losses and rows of the current step's micro-batches, left on their device until the step is checked.

    The check reads one flag from the device, once per optimizer step and before the weights change. A GPU then waits
    for that step's backward pass, which TRL makes it do several times per micro-batch anyway to fill its own figures.
    """

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, loss: torch.Tensor, rows: torch.Tensor) -> None:
        """Take in a micro-batch: its loss and the (n,) rows of its pairs in the training data."""
        self._batches.append((loss.detach(), rows))

    def check(self, step: int, norm: torch.Tensor | float | None) -> None:
        """Raise `NotFinite`, on all processes, if a number of the step that ends now is not finite.

        The step is counted from 1. The gradient's norm is None where it may be infinite: float16, whose scaler then
        skips the step.
        """
        losses = torch.stack([loss for loss, _ in self._batches])
        numbers = losses if norm is None else torch.cat([losses, torch.as_tensor(norm).to(losses).reshape(1)])
        if not _finite_everywhere([numbers]):
            self._stop(step, norm)
        self._batches = []

    def _stop(self, step: int, norm: torch.Tensor | float | None) -> None:
        batches = gather_object([(loss.item(), rows.tolist()) for loss, rows in self._batches])
        bad = [(loss, rows) for loss, rows in batches if not math.isfinite(loss)]
        what = f"the loss {bad[0][0]}" if bad else f"the gradient norm {float(norm)}"
        rows = ", ".join(map(str, sorted(row for _, rows in bad or batches for row in rows)))
        raise NotFinite(
            f"step {step}: expected finite numbers, found {what}, from rows {rows} of the training data; "
            f"{_latest_checkpoint(self._output_dir)}; lower learning_rate, or look at those rows"
        )


def _finite_everywhere(tensors: Iterable[torch.Tensor]) -> bool:
    flags = torch.stack([torch.isfinite(tensor).all() for tensor in tensors])
    return bool(gather(flags.all().int().reshape(1)).all())


def _latest_checkpoint(output_dir: Path) -> str:
    """The run's newest valid checkpoint, in words for an error."""
    checkpoint = latest_valid(output_dir)
    return f"the newest good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


def require_sound_weights(model: torch.nn.Module, step: int, output_dir: Path) -> None:
    """Raise `NotFinite`, on all processes, unless trained weights are finite and all replicas hold the same.

    Engines that shard the weights (FSDP, ZeRO-3) have no replicas to compare. The model is not wrapped.
    """
    trained = [weights.detach() for weights in model.parameters() if weights.requires_grad]
    if not _finite_everywhere(getattr(weights, "to_local", lambda own=weights: own)() for weights in trained):
        raise NotFinite(
            f"step {step}: expected finite weights, found inf or nan after the update; "
            f"{_latest_checkpoint(output_dir)}; lower learning_rate"
        )
    state = PartialState()
    if state.num_processes == 1 or state.distributed_type == DistributedType.FSDP or is_deepspeed_zero3_enabled():
        return
    digest = hashlib.sha256()
    for weights in trained:
        digest.update(weights.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    ranks: dict[str, list[str]] = {}
    for rank, found in enumerate(gather_object([digest.hexdigest()])):
        ranks.setdefault(found, []).append(str(rank))
    if len(ranks) > 1:
        kinds = " unlike ".join(f"those of rank {', '.join(each)}" for each in sorted(ranks.values(), key=len))
        raise NotFinite(
            f"step {step}: expected the same weights on all processes, found {kinds}; "
            f"{_latest_checkpoint(output_dir)}; look at those devices, then resume"
        )


def require_finite_scores(scores: np.ndarray, rows: np.ndarray) -> None:
    """Raise `NotFinite`, with the (n,) `rows` concerned, if one of the (n, 2) scores of an evaluation is not finite."""
    bad = ~np.isfinite(scores).all(axis=1)
    if bad.any():
        found = ", ".join(map(str, rows[bad]))
        raise NotFinite(
            f"evaluation: expected finite scores, found inf or nan, on rows {found} of the evaluated pairs; lower "
            "learning_rate, or look at those rows"
        )
