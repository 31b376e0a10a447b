"""How the score of every token is read from a model whose own output holds one pooled score a row."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from reward_recipes.packing.attention import BY_TEXT
from reward_recipes.packing.layout import packed_attention_mask

INPUTS = ("input_ids", "position_ids", "attention_mask")


class ScoreTap:
    """Makes a model return the scores of the texts in packed rows, while a batch of them is being read.

    Hooks give the model, an adapter included, the mask of packed rows, take the scores from its `score` module, and
    hand them out as its own output. So the model is still called as a whole, and its wrappers (DDP, FSDP, DeepSpeed)
    see the very tensor that the loss is computed from.

    Args:
        model: not wrapped.
        limit: the `row_limit` that its rows are packed by; without one, the model attends text by text.
    """

    def __init__(self, model: nn.Module, limit: float) -> None:
        self._batch: Mapping[str, torch.Tensor] | None = None  # the one being read; other calls are left alone
        self._scores: torch.Tensor | None = None
        if limit == math.inf:
            model.set_attn_implementation(BY_TEXT)
        head = next(module for name, module in model.named_modules() if name.split(".")[-1] == "score")
        self._handles = (
            model.register_forward_pre_hook(self._give_mask, with_kwargs=True),
            head.register_forward_hook(self._keep),
            model.register_forward_hook(self._hand_out),
        )

    @contextmanager
    def reading(self, batch: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Prepare the model, wrapped or not, to be called with a batch of `PackedCollator` or `pack_texts`.

        Yields:
            The keyword inputs for that call; its output has `logits` (texts, 1) in the order of `score_index`. TRL
            counts tokens in `attention_mask` (R, W), and its loss takes `margin` (n,) where there is one; a hook
            replaces the first and drops the second before the model runs.
        """
        outer, self._batch = self._batch, batch
        try:
            yield {name: batch[name] for name in (*INPUTS, "margin") if name in batch}
        finally:
            self._batch, self._scores = outer, None

    def forward(self, model: nn.Module, **batch: torch.Tensor) -> SequenceClassifierOutput:
        """What `model`, wrapped or not, returns for a batch that is being read."""
        with self.reading(batch) as inputs:
            return model(**inputs)

    def _give_mask(self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        if self._batch is None:
            return None
        batch = self._batch
        mask = batch["spans"][None, None] if "spans" in batch else packed_attention_mask(batch["pair"], batch["side"])
        return args, {name: inputs[name] for name in INPUTS} | {"attention_mask": mask, "use_cache": False}

    def _keep(self, head: nn.Module, args: tuple[Any, ...], scores: torch.Tensor) -> None:
        if self._batch is not None:
            self._scores = scores

    def _hand_out(self, model: nn.Module, args: tuple[Any, ...], output: object) -> SequenceClassifierOutput | None:
        if self._batch is None:
            return None
        return SequenceClassifierOutput(logits=self._scores.flatten(0, 1)[self._batch["score_index"]])

    def remove(self) -> None:
        """Take the hooks off the model. Attention by text stays: to what is not packed it is `sdpa`."""
        for handle in self._handles:
            handle.remove()
