"""Attention on a CPU: each packed text attends within itself, and nothing between the texts of a row is computed."""

import math
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_TEXT = "sdpa_by_text"


def row_limit(limit: int, device: torch.device) -> float:
    """The most tokens of a packed row: `limit`, but all of a batch on a CPU, where a long row costs no more."""
    return math.inf if device.type == "cpu" else limit


def attend_by_text(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`; text by text where the `spans` of `pack_texts`, (1, 1, texts, 2), are given as the mask.

    Query, key and value are (1, heads, tokens, head size), and the output is (1, tokens, heads, head size).
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _each_text(module, query, key, value, attention_mask.flatten(0, 2), options), None


@torch.compiler.disable  # lengths differ in each batch, for which a graph would be compiled anew
def _each_text(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    options = options | {"is_causal": True}  # for a first text; a tail has a mask
    texts = (tensor.split(spans[:, 1].tolist(), dim=2) for tensor in (query, key, value))
    outputs, begun = [], []  # the second: key and value of the text that began last
    for (prefix, own), text_query, *seen in zip(spans.tolist(), *texts, strict=True):
        mask = None
        if prefix:
            seen = [torch.cat([first[:, :, :prefix], tail], dim=2) for first, tail in zip(begun, seen, strict=True)]
            mask = torch.ones(own, prefix + own, dtype=torch.bool, device=query.device).tril(prefix)[None, None]
        else:
            begun = seen
        outputs.append(sdpa_attention_forward(module, text_query, *seen, mask, **options)[0])
    return torch.cat(outputs, dim=1)


AttentionInterface.register(BY_TEXT, attend_by_text)
AttentionMaskInterface.register(BY_TEXT, sdpa_mask)  # for what is not packed
