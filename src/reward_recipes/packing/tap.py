"""How the score of every token is read from a model whose own output holds one pooled score a row."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from reward_recipes.packing.layout import packed_attention_mask


class ScoreTap:
    """Makes a model return the scores of the texts in packed rows, while a batch of them is being read.

    The scores come from the `score` module and leave as the model's own output. So the model is still called as a
    whole, and its wrappers (DDP, FSDP, DeepSpeed, PEFT) see the very tensor that the loss is computed from.

    Args:
        model: as it will be wrapped, an adapter included.
    """

    def __init__(self, model: nn.Module) -> None:
        self._score_index: torch.Tensor | None = None  # of the batch being read; other calls are left alone
        self._scores: torch.Tensor | None = None
        head = next(module for name, module in model.named_modules() if name.split(".")[-1] == "score")
        self._handles = (head.register_forward_hook(self._keep), model.register_forward_hook(self._hand_out))

    @contextmanager
    def reading(self, batch: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
        """Prepare the model, wrapped or not, to be called once with a batch of `PackedCollator` or `pack_texts`.

        Yields:
            The model's keyword inputs, and `margin` (n,) where the batch has one, for TRL's loss. Called with them, the
            model returns `logits` (texts, 1) in the order of `score_index`: for pairs, as from TRL's padded batch, the
            scores at EOS of the chosen texts, then of the rejected ones.
        """
        inputs: dict[str, Any] = {
            name: batch[name] for name in ("input_ids", "position_ids", "margin") if name in batch
        }
        inputs["attention_mask"] = packed_attention_mask(batch["pair"], batch["side"])
        inputs["use_cache"] = False
        outer, self._score_index = self._score_index, batch["score_index"]
        try:
            yield inputs
        finally:
            self._score_index, self._scores = outer, None

    def forward(self, model: nn.Module, **batch: torch.Tensor) -> SequenceClassifierOutput:
        """What `model`, wrapped or not, returns for one batch while it is being read."""
        with self.reading(batch) as inputs:
            return model(**inputs)

    def _keep(self, head: nn.Module, args: tuple[Any, ...], scores: torch.Tensor) -> None:
        if self._score_index is not None:
            self._scores = scores

    def _hand_out(self, model: nn.Module, args: tuple[Any, ...], output: object) -> SequenceClassifierOutput | None:
        if self._score_index is None:
            return None
        return SequenceClassifierOutput(logits=self._scores.flatten(0, 1)[self._score_index])

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
