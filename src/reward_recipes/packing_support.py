"""Whether a model computes the same scores from packed rows: what its configuration says, then a comparison."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from reward_recipes.collators import PackedCollator, PaddedCollator
from reward_recipes.errors import UserError
from reward_recipes.packing import ScoreTap, packed_length

TOLERANCE = 1e-4
COMPARED_PAIRS = 6


def choose_packing(
    setting: str, model: PreTrainedModel, dataset: Dataset, max_length: int, max_tokens_per_row: int
) -> bool:
    """Decide whether to pack.

    Args:
        setting: `true`, `false`, or `auto`: pack if that is exact for this model.
        model: as loaded, in the configuration to train with.
        dataset: tokenised training pairs; a few are scored both ways.
        max_length: most tokens of a text.
        max_tokens_per_row: as in `PackedCollator`.

    Raises:
        UserError: `true` for a model whose packed scores would differ.
    """
    if setting == "false":
        return False
    reason = unsupported(model, max_length) or _differs(model, dataset, max_tokens_per_row)
    if reason and setting == "true":
        raise UserError(f"pair_packing: expected a model that can be packed, found {reason}; set pair_packing to auto")
    if reason:
        warnings.warn(f"pairs are not packed, so training is slower: {reason}", stacklevel=2)
    return reason is None


def unsupported(model: PreTrainedModel, max_length: int) -> str | None:
    """Why the configuration alone rules packing out; None if it does not."""
    config = model.config.get_text_config()
    if not hasattr(model, "score"):
        return f"{type(model).__name__}, which has no score for every token"
    if config._attn_implementation != "sdpa":
        return (
            f"attn_implementation {config._attn_implementation!r}, which does not take the mask of packed pairs "
            "(flash_attention_2 takes none at all); set attn_implementation to sdpa"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < max_length:
        return f"a sliding window of {window} tokens below max_length {max_length}, which packed rows would ignore"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))}, which mix the tokens of a row without a mask"
    if getattr(model, "is_quantized", False):
        return "quantised weights, whose packed and plain scores cannot be compared in float32"
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        return "weights that are sharded from the start (DeepSpeed ZeRO-3), so that scores cannot be compared first"
    return None


def _differs(model: PreTrainedModel, dataset: Dataset, max_tokens_per_row: int) -> str | None:
    """Score a few pairs both ways, the longest ones among them; say how far apart the scores are if they differ."""
    lengths = [packed_length(pair) for pair in dataset.select_columns(["chosen_ids", "rejected_ids", "prefix"])]
    longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[: COMPARED_PAIRS // 2]
    pairs = list(dataset.select([*longest, *range(min(len(lengths), COMPARED_PAIRS // 2))]))
    pad = model.config.get_text_config().pad_token_id
    tap = ScoreTap(model)
    try:
        with _float32_eval(model), torch.no_grad():
            padded = PaddedCollator(pad_token_id=pad)(pairs)
            names = ("input_ids", "attention_mask")
            plain = model(**{name: padded[name].to(model.device) for name in names}, use_cache=False).logits
            batch = PackedCollator(pad, max_tokens_per_row)(pairs)
            packed = tap.forward(model, **{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        return f"{type(model).__name__}, which cannot score packed rows ({str(error).splitlines()[0]})"
    finally:
        tap.remove()
    difference = (plain - packed).abs().max().item()
    if not difference <= TOLERANCE:
        return f"{type(model).__name__}, whose packed scores differ from plain ones by {difference:.2g}"
    return None


@contextmanager
def _float32_eval(model: PreTrainedModel) -> Iterator[None]:
    """Compare without rounding or dropout; going to float32 and back changes no weight of lower precision."""
    training = model.training
    low = [t for t in chain(model.parameters(), model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    dtypes = [tensor.dtype for tensor in low]
    try:
        for tensor in low:
            tensor.data = tensor.data.float()
        model.eval()
        yield
    finally:
        for tensor, dtype in zip(low, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
        model.train(training)
