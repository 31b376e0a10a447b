"""Whether a model computes the same scores from packed rows: what its configuration says, then a comparison."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel

from reward_recipes.packing.layout import Group, group_of, pack_texts, pad_texts
from reward_recipes.packing.tap import ScoreTap
from reward_recipes.run import UserError, first_line

TOLERANCE = 1e-4  # of the largest score


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
    reason = unsupported(model, max_length)
    if reason is None and PartialState().is_main_process:
        pairs = dataset.select(_telling_pairs(dataset, max_length))
        reason = packing_difference(model, [group_of(pair) for pair in pairs], max_tokens_per_row)
    (reason,) = broadcast_object_list([reason])  # all processes must pack, or none
    if reason and setting == "true":
        raise UserError(f"pair_packing: expected a model that can be packed, found {reason}; set pair_packing to auto")
    if reason and PartialState().is_main_process:
        warnings.warn(f"pairs are not packed, so training is slower: {reason}", stacklevel=2)
    return reason is None


def unsupported(model: PreTrainedModel, max_length: int) -> str | None:
    """Why the configuration alone rules packing out; None if it does not."""
    config, name = model.config.get_text_config(), type(model).__name__
    if not hasattr(model, "score"):
        return f"{name}, which has no score for every token"
    if (attention := config._attn_implementation) != "sdpa":
        if model.get_correct_attn_implementation(None) != "sdpa":
            return f"{name}, which has no sdpa attention in transformers"
        reason = "which does not take the mask of packed pairs (flash_attention_2 takes none at all)"
        return f"attn_implementation {attention!r}, {reason}; set attn_implementation to sdpa"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < max_length:
        return f"a sliding window of {window} tokens below max_length {max_length}, which packed rows would ignore"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))}, which do not go by the mask of packed pairs"
    return _unsupported_setup(model)


def _unsupported_setup(model: PreTrainedModel) -> str | None:
    """Why weights or processes rule packing out."""
    if getattr(model, "is_quantized", False):
        return "quantised weights, whose packed and plain scores cannot be compared in float32"
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        return "weights that are sharded from the start (DeepSpeed ZeRO-3), so that scores cannot be compared first"
    state, devices = PartialState(), torch.cuda.device_count()
    if state.device.type == "cuda" and devices > 1 and state.distributed_type == DistributedType.NO:
        # Trainer would split the rows of a batch over all GPUs, and their pairs' bookkeeping with them.
        return f"{devices} GPUs in one process; start one process a GPU with accelerate launch"
    return None


def _telling_pairs(dataset: Dataset, max_length: int) -> list[int]:
    """Rows of the pairs to compare: two each of the longest layout, of the longest text, and from the start."""
    columns = dataset.select_columns(["chosen_length", "rejected_length", "prefix"]).to_pandas()
    texts = columns[["chosen_length", "rejected_length"]]
    cut_off = (texts.max(axis=1) - max_length).clip(lower=0)  # under `overlong: keep_end`, from both sides
    texts = texts.sub(cut_off, axis=0)
    layout = texts.sum(axis=1) - columns["prefix"]
    return sorted({*layout.nlargest(2).index, *texts.max(axis=1).nlargest(2).index, *columns.index[:2]})


def packing_difference(model: PreTrainedModel, groups: Sequence[Group], max_tokens_per_row: int) -> str | None:
    """Score the texts of groups both ways; say how far apart the scores are if they differ."""
    name, pad = type(model).__name__, model.config.get_text_config().pad_token_id
    tap = ScoreTap(model)
    try:
        with _float32_eval(model), torch.no_grad():
            padded = pad_texts([text for group in groups for text in group.texts], pad)
            plain = model(**{key: tensor.to(model.device) for key, tensor in padded.items()}, use_cache=False).logits
            packed = pack_texts(groups, max_tokens_per_row, pad)
            shared = tap.forward(model, **{key: tensor.to(model.device) for key, tensor in packed.items()}).logits
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        return f"{name}, which cannot score packed rows ({first_line(error)})"
    finally:
        tap.remove()
    difference, largest = (plain - shared).abs().max().item(), plain.abs().max().item()
    if not difference <= TOLERANCE * largest:
        return (
            f"{name}, whose packed scores differ by up to {difference:.2g} from plain ones, which reach {largest:.2g}"
        )
    return None


@contextmanager
def _float32_eval(model: PreTrainedModel) -> Iterator[None]:
    """Compare without rounding or dropout; going to float32 and back changes no weight of lower precision."""
    training = model.training
    tensors = chain(model.parameters(), model.buffers())
    low = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    try:
        for tensor, _ in low:
            tensor.data = tensor.data.float()
        model.eval()
        yield
    finally:
        for tensor, dtype in low:
            tensor.data = tensor.data.to(dtype)
        model.train(training)
