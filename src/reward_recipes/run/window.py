"""What is measured between two rows of the log: loss, accuracy, rewards and tokens of each micro-batch."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

TOKEN_COUNTS = ("num_tokens", "num_unique_tokens", "num_padded_tokens")
TOTALS = ("pairs", *TOKEN_COUNTS)


class LoggingWindow(TrainerCallback, ExportableState):
    """Figures of the micro-batches since the last row, and totals since the start of the run.

    Figures stay on their device until a row is due. A checkpoint holds the totals and every process's open
    micro-batches, so that a resumed run logs the same row.
    """

    COLUMNS = ("loss", "pairs", "correct", "margin", "reward", "min_reward", "max_reward", *TOKEN_COUNTS)

    def __init__(self) -> None:
        self._start_empty()

    def _start_empty(self) -> None:
        self.accuracy: float | None = None  # of the last row
        self._opened_at = 0  # step of the last row
        self._batches: list[torch.Tensor] = []
        self.totals = dict.fromkeys(TOTALS, 0)
        self._all_batches: list[list[list[float]]] = []

    def add(self, loss: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take in a micro-batch: what it adds to its step's loss, (n, 2) scores, chosen first, (3,) TOKEN_COUNTS."""
        loss, scores = loss.detach(), scores.detach()
        margin = scores[:, 0] - scores[:, 1]
        correct = (margin > 0).sum() + 0.5 * (margin == 0).sum()
        pairs = torch.full_like(correct, len(scores))
        figures = (loss, pairs, correct, margin.sum(), scores.sum(), scores.min(), scores.max(), *tokens)
        self._batches.append(torch.stack([figure.float() for figure in figures]))

    def drain(self, step: int, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Figures over all processes since the last row; empty without a micro-batch.

        `loss` is the mean over optimizer steps; `accuracy`, `margin` and `mean_reward` are means over pairs;
        `min_reward` and `max_reward` are, as in TRL, means over micro-batches of each one's extreme. `pairs` and the
        token counts are totals since the start of the run. `gather` concatenates tensors of all processes.
        """
        if not self._batches:
            return {}
        count = len(self._batches)
        table = gather(torch.stack(self._batches)).cpu().double().reshape(-1, count, len(self.COLUMNS))
        loss, pairs, correct, margin, reward, lowest, highest, *tokens = table.unbind(-1)
        steps = step - self._opened_at
        self._batches, self._opened_at = [], step
        for name, counted in zip(TOTALS, (pairs, *tokens), strict=True):
            self.totals[name] += int(counted.sum())
        self.accuracy = (correct.sum() / pairs.sum()).item()
        return {
            "loss": loss.sum().item() / len(table) / steps,
            "accuracy": self.accuracy,
            "margin": (margin.sum() / pairs.sum()).item(),
            "mean_reward": (reward.sum() / (2 * pairs.sum())).item(),
            "min_reward": lowest.amin(0).mean().item(),
            "max_reward": highest.amax(0).mean().item(),
            **self.totals,
        }

    def collect(self) -> None:
        """Gather the open micro-batches of all processes; to be called on each before a checkpoint."""
        self._all_batches = gather_object([[batch.tolist() for batch in self._batches]])

    def state(self) -> dict[str, dict[str, Any]]:
        # float32 figures pass through JSON unchanged
        saved = {"opened_at": self._opened_at, "totals": self.totals, "batches": self._all_batches}
        return {"args": {}, "attributes": saved}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start with nothing, or with what the checkpoint holds, which as many processes saved."""
        self._start_empty()
        if state.global_step:
            saved = state.stateful_callbacks[type(self).__name__]["attributes"]
            self._opened_at, self.totals = saved["opened_at"], dict(saved["totals"])
            batches = saved["batches"][args.process_index] if state.global_step > self._opened_at else []
            self._batches = [torch.tensor(batch, device=args.device) for batch in batches]
