"""Under dropout, rows without shared prompts train as stock TRL does: loss and gradient have the same distribution.

That no two texts share a cell, and so a mask, is held in test_packing.py.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from toys import PAD, random_pairs, tiny_model

from reward_recipes.packing import PackedCollator, PaddedCollator, ScoreTap

SEEDS = 200


def drawn(collate: Callable[[Any], dict[str, torch.Tensor]]) -> np.ndarray:
    """(SEEDS, 2) loss and norm of the head's gradient of training passes that differ in their dropout alone."""
    model, batch, found = tiny_model("gpt2").train(), collate(random_pairs(6, longest=20)), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    tap, plain = ScoreTap(model, math.inf), {name: batch[name] for name in ("input_ids", "attention_mask")}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        output = tap.forward(model, **batch) if "score_index" in batch else model(**plain)
        chosen, rejected = output.logits.flatten().chunk(2)
        loss = -torch.nn.functional.logsigmoid(10 * (chosen - rejected)).mean()
        (gradient,) = torch.autograd.grad(loss, model.score.weight)
        found.append([loss.item(), gradient.norm().item()])
    return np.array(found)


@pytest.mark.parametrize("limit", [96, math.inf])
def test_mean_and_spread_are_those_of_stock_training(limit: float) -> None:
    """Means within four standard errors, spreads within a quarter."""
    stock, ours = drawn(PaddedCollator(pad_token_id=PAD)), drawn(PackedCollator(PAD, limit, share_prompts=False))
    error = np.sqrt((stock.var(axis=0) + ours.var(axis=0)) / SEEDS)
    assert (stock.std(axis=0) > 0).all() and (np.abs(stock.mean(axis=0) - ours.mean(axis=0)) < 4 * error).all()
    assert ours.std(axis=0) == pytest.approx(stock.std(axis=0), rel=0.25)
