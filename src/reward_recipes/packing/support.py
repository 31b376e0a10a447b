"""Whether a model computes the same scores from packed rows: what its configuration says, then a comparison."""

import warnings
from collections.abc import Sequence
from itertools import chain

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from reward_recipes.packing.attention import BY_TEXT
from reward_recipes.packing.layout import Group, group_of, pack_texts, pad_texts
from reward_recipes.packing.tap import ScoreTap
from reward_recipes.run import UserError, first_line

TOLERANCE = 1e-4  # of the largest score
SAID = {
    "shared": "prompts and rows are shared, in training and evaluation",
    "unshared": "prompts and rows are shared in evaluation; in training rows alone, because dropout is on",
    "padded": "prompts and rows are shared in evaluation; in training nothing is (pair_packing: false)",
}


def choose_packing(
    setting: str, model: PreTrainedModel, pairs: Dataset, max_length: int, row_limit: float, dropout: bool = False
) -> str | None:
    """Decide how tokenised training pairs are laid out, and say it. Evaluation shares all wherever that is exact.

    Args:
        setting: `true` (share prompts and rows), `false` (pad, as TRL does) or `auto`: share what is exact.
        dropout: whether it is on in training. Both texts of a pair would then share the prefix's dropout mask, which
            stock training draws twice, so `auto` shares rows alone.

    Returns:
        `shared`, `unshared` or `padded`; None if nothing can be packed.

    Raises:
        UserError: `true` for a model whose packed scores would differ.
    """
    reason = unsupported(model, max_length)
    if reason is None:
        lengths = pairs.select_columns(["chosen_length", "rejected_length"]).to_pandas().max(axis=1)
        some = pairs.select(sorted({*lengths.nlargest(2).index, *lengths.index[:2]}))
        reason = packing_difference(model, [group_of(pair) for pair in some], row_limit)
    (reason,) = broadcast_object_list([reason])  # all processes must pack, or none
    if reason and setting == "true":
        raise UserError(f"pair_packing: expected a model that can be packed, found {reason}; set pair_packing to auto")
    if reason and setting == "auto" and PartialState().is_main_process:
        warnings.warn(f"pairs are not packed, so training is slower: {reason}", stacklevel=2)
    if reason:
        return None
    layout = {"true": "shared", "false": "padded"}.get(setting, "unshared" if dropout else "shared")
    PartialState().print(f"packing: {SAID[layout]}")
    return layout


def has_dropout(model: nn.Module) -> bool:
    """Whether a module of the model drops something in training."""
    for module in model.modules():
        rates = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        if any(rate > 0 for rate in rates) or (isinstance(module, nn.Dropout) and module.p > 0):
            return True
    return False


def unsupported(model: PreTrainedModel, max_length: int) -> str | None:
    """Why the configuration or the weights alone rule packing out; None if they do not."""
    config = model.config.get_text_config()
    if not hasattr(model, "score"):
        return f"{type(model).__name__}, which has no score for every token"
    if (attention := config._attn_implementation) not in ("sdpa", BY_TEXT):
        return f"attn_implementation {attention!r}, where the mask of packed pairs needs sdpa"
    window = getattr(config, "sliding_window", None)
    if window and window < max_length:  # a comparison of shorter texts cannot tell
        return f"a sliding window of {window} tokens below max_length {max_length}, which packed rows would ignore"
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        return "weights that are sharded from the start (DeepSpeed ZeRO-3), so that scores cannot be compared first"
    return None


def packing_difference(model: PreTrainedModel, groups: Sequence[Group], limit: float) -> str | None:
    """Score texts both ways, in float32 without dropout; say how far apart the scores are if they differ."""
    name, pad = type(model).__name__, model.config.get_text_config().pad_token_id
    tensors = chain(model.parameters(), model.buffers())
    # To float32 and back changes no weight of lower precision.
    low = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    training, attention, tap = model.training, model.config._attn_implementation, None
    padded = pad_texts([text for group in groups for text in group.texts], pad)
    packed = pack_texts(groups, limit, pad)
    try:
        for tensor, _ in low:
            tensor.data = tensor.data.float()
        model.eval()
        with torch.no_grad():
            plain = model(**{key: tensor.to(model.device) for key, tensor in padded.items()}, use_cache=False).logits
            tap = ScoreTap(model, limit)
            shared = tap.forward(model, **{key: tensor.to(model.device) for key, tensor in packed.items()}).logits
    except Exception as error:  # whatever a model raises on inputs that it was not made for
        return f"{name}, which cannot score packed rows ({first_line(error)})"
    finally:
        if tap is not None:
            tap.remove()
            model.set_attn_implementation(attention)
        for tensor, dtype in low:
            tensor.data = tensor.data.to(dtype)
        model.train(training)
    difference, largest = (plain - shared).abs().max().item(), plain.abs().max().item()
    if difference <= TOLERANCE * largest:
        return None
    return f"{name}, whose packed scores differ by up to {difference:.2g} from plain ones, which reach {largest:.2g}"
