"""Whether the numbers of a step are fit to train on: its losses and its gradient norm are finite on all processes."""

import math
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather, gather_object

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
        """Stop the run if a number of the step that ends now is not finite, else start the next.

        The step is counted from 1. The gradient's norm is None where it may be infinite: float16, whose scaler then
        skips the step.

        Raises:
            NotFinite: on all processes; it names the step, the rows and the newest valid checkpoint.
        """
        losses = torch.stack([loss for loss, _ in self._batches])
        numbers = losses if norm is None else torch.cat([losses, torch.as_tensor(norm).to(losses).reshape(1)])
        if not gather(torch.isfinite(numbers).all().int().reshape(1)).all():
            self._stop(step, norm)
        self._batches = []

    def _stop(self, step: int, norm: torch.Tensor | float | None) -> None:
        batches = gather_object([(loss.item(), rows.tolist()) for loss, rows in self._batches])
        bad = [(loss, rows) for loss, rows in batches if not math.isfinite(loss)]
        what = f"the loss {bad[0][0]}" if bad else f"the gradient norm {float(norm)}"
        rows = ", ".join(map(str, sorted(row for _, rows in bad or batches for row in rows)))
        raise NotFinite(
            f"step {step}: expected finite numbers, found {what}, from rows {rows} of the training data; "
            f"{latest_checkpoint(self._output_dir)}; lower learning_rate, or look at those rows"
        )


def latest_checkpoint(output_dir: Path) -> str:
    """The run's newest valid checkpoint, in words for an error."""
    checkpoint = latest_valid(output_dir)
    return f"the newest good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


def require_finite_weights(model: torch.nn.Module, step: int, output_dir: Path) -> None:
    """Raise `NotFinite`, on all processes, if a weight that is trained is not finite: it must not be saved."""
    trained = (parameter.detach() for parameter in model.parameters() if parameter.requires_grad)
    flags = [torch.isfinite(getattr(weights, "to_local", lambda w=weights: w)()).all() for weights in trained]
    if not gather(torch.stack(flags).all().int().reshape(1)).all():
        raise NotFinite(
            f"step {step}: expected finite weights, found inf or nan after the update; "
            f"{latest_checkpoint(output_dir)}; lower learning_rate"
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
