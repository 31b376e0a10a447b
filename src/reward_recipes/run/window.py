"""What is measured between two logs: figures of each micro-batch, left on their device until they are asked for."""

from collections.abc import Callable

import torch

TOKEN_COUNTS = ("num_tokens", "num_unique_tokens", "num_padded_tokens")


class LoggingWindow:
    """Figures of the micro-batches since the last log, left on their device until they are asked for."""

    COLUMNS = ("pairs", "correct", "margin", "reward", "min_reward", "max_reward", *TOKEN_COUNTS)

    def __init__(self) -> None:
        self._batches: list[torch.Tensor] = []

    def add(self, scores: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take in a micro-batch: (n, 2) scores of its pairs and its (3,) token counts, in the order of TOKEN_COUNTS."""
        margin = scores[:, 0] - scores[:, 1]
        correct = (margin > 0).sum() + 0.5 * (margin == 0).sum()
        pairs = torch.full_like(correct, len(scores))
        figures = (pairs, correct, margin.sum(), scores.sum(), scores.min(), scores.max(), *tokens)
        self._batches.append(torch.stack([figure.float() for figure in figures]))

    def drain(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Figures over all processes since the last call; empty without a micro-batch.

        `accuracy`, `margin` and `mean_reward` are means over pairs; `min_reward` and `max_reward` are, as in TRL, the
        means over micro-batches of each one's extreme; `pairs` and the token counts are sums.
        """
        if not self._batches:
            return {}
        batches = len(self._batches)
        table = gather(torch.stack(self._batches)).cpu().double().reshape(-1, batches, len(self.COLUMNS))
        self._batches.clear()
        pairs, correct, margin, reward, lowest, highest, *tokens = table.unbind(-1)
        return {
            "accuracy": (correct.sum() / pairs.sum()).item(),
            "margin": (margin.sum() / pairs.sum()).item(),
            "mean_reward": (reward.sum() / (2 * pairs.sum())).item(),
            "min_reward": lowest.amin(0).mean().item(),
            "max_reward": highest.amax(0).mean().item(),
            "pairs": int(pairs.sum()),
        } | {name: int(count.sum()) for name, count in zip(TOKEN_COUNTS, tokens, strict=True)}

    def export(self) -> list[list[float]]:
        """The micro-batches of this process so far, for a checkpoint that falls inside a window."""
        return [batch.tolist() for batch in self._batches]

    def restore(self, batches: list[list[float]], device: torch.device) -> None:
        """Go on from what `export` gave; float32 figures pass through JSON unchanged."""
        self._batches = [torch.tensor(batch, device=device) for batch in batches]
