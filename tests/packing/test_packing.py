"""Packed rows hold every token once and give the scores, losses and gradients of texts computed one by one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REAL_DATA, needs_real_data
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from toys import (
    ARCHITECTURES,
    EOS,
    PAD,
    config,
    corner_pairs,
    dataset,
    pair,
    random_pairs,
    text_score,
    tiny_model,
    tiny_trainer,
)
from transformers import PreTrainedModel

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.packing import EvalBatches, PackedCollator, ScoreTap
from reward_recipes.packing.layout import NO_PAIR, assign_rows, group_of, packed_attention_mask
from reward_recipes.pairs import encode_splits, load_pairs, load_tokenizer, usable_pairs

# peft and transformers disagree about names and layouts that are not ours to choose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
# Why the other architectures cannot be packed: a piece of what their users are told.
REFUSED = {
    "bloom": "'eager', where the mask of packed pairs needs sdpa",  # ALiBi
    "falcon": "FalconForSequenceClassification, which cannot score packed rows",  # ALiBi, with sdpa
    "bert": "BertForSequenceClassification, which has no score for every token",
    "roberta": "RobertaForSequenceClassification, which has no score for every token",
    "qwen3_next": "Qwen3NextForSequenceClassification, whose packed scores differ",  # linear attention
}
EXACT = [name for name in ARCHITECTURES if name not in REFUSED]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def test_layout_of_two_pairs_by_hand() -> None:
    """Pair 0: texts 5 6 7 0 and 5 6 8 9 0, prefix 5 6. Pair 1: texts 3 0 and 4 0, no prefix.

    Row of 7 + 4 tokens: 5 6 | 7 0 | 8 9 0 || 3 0 | 4 0, each tail on the positions after its prefix. In rows of 7 the
    second one ends in padding, which sees only padding.
    """
    pairs = [pair([5, 6, 7], [5, 6, 8, 9]), pair([3], [4])]
    packed = PackedCollator(PAD, 11)(pairs)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 0, 8, 9, 0, 3, 0, 4, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 0, 1]]
    assert packed["pair"].tolist() == [[0] * 7 + [1] * 4]
    assert packed["side"].tolist() == [[0, 0, 1, 1, 2, 2, 2, 1, 1, 2, 2]]  # prefix, chosen, rejected
    assert packed["score_index"].tolist() == [3, 8, 6, 10]  # EOS of both chosen, then of both rejected texts
    mask = packed_attention_mask(packed["pair"], packed["side"])[0, 0]
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6], [7], [7, 8], [9], [9, 10]]
    assert [row.nonzero().flatten().tolist() for row in mask] == seen
    packed = PackedCollator(PAD, 7)(pairs)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 0, 8, 9, 0], [3, 0, 4, 0, PAD, PAD, PAD]]
    assert packed["attention_mask"].tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    assert packed["pair"][1].tolist() == [1] * 4 + [NO_PAIR] * 3
    mask = packed_attention_mask(packed["pair"], packed["side"])[1, 0]
    assert [row.nonzero().flatten().tolist() for row in mask[4:]] == [[4], [4, 5], [4, 5, 6]]
    assert PackedCollator(PAD, math.inf)(pairs)["spans"].tolist() == [[0, 4], [2, 3], [0, 2], [0, 2]]


texts = st.lists(st.integers(2, 4), max_size=12)
pairs_of_texts = st.lists(st.builds(lambda prefix, a, b: pair(prefix + a, prefix + b), texts, texts, texts), min_size=1)


@settings(deadline=None, max_examples=60)
@given(examples=pairs_of_texts, limit=st.integers(1, 60), share=st.booleans())
def test_each_token_stands_once_and_sees_its_own_text_only(
    examples: list[dict[str, Any]], limit: int, share: bool
) -> None:
    packed = PackedCollator(PAD, limit, share)(examples)
    ids, positions = packed["input_ids"].flatten(), packed["position_ids"].flatten()
    width = packed["input_ids"].shape[1]
    mask = packed_attention_mask(packed["pair"], packed["side"])[:, 0].flatten(0, 1)
    seen_by_score: list[set[int]] = []
    for text, index in enumerate(packed["score_index"].tolist()):
        example, side = examples[text % len(examples)], ("chosen_ids", "rejected_ids")[text // len(examples)]
        row_start = index // width * width
        seen = [row_start + column for column in mask[index].nonzero().flatten().tolist()]
        assert ids[seen].tolist() == example[side]
        assert positions[seen].tolist() == list(range(len(example[side])))
        for place, cell in enumerate(seen):  # and so do the tokens that the score is computed from
            assert [row_start + column for column in mask[cell].nonzero().flatten().tolist()] == seen[: place + 1]
        seen_by_score.append(set(seen))
    groups: list[set[int]] = []
    for index, example in enumerate(examples):
        chosen, rejected = seen_by_score[index], seen_by_score[index + len(examples)]
        assert len(chosen & rejected) == (example["prefix"] if share else 0)
        groups += [chosen | rejected] if share else [chosen, rejected]
    lengths = [len(group) for group in groups]
    assert len(set().union(*groups)) == sum(lengths) == packed["attention_mask"].sum()
    assert width <= max(limit, *lengths)


def batches(pairs: Dataset, device: str, most: int) -> list[dict[str, torch.Tensor]]:
    return [*DataLoader(EvalBatches(pairs, PAD, torch.device(device), most, 768), collate_fn=EvalBatches.collate)]


def test_evaluation_batches_keep_to_what_fits() -> None:
    """200 pairs of up to 401 tokens: on a CPU at most 2,048 cells, elsewhere as many pairs as are allowed."""
    pairs = dataset(random_pairs(200, longest=200))
    for device, most in (("cpu", 64), ("cpu", 2), ("cuda", 5)):
        found = batches(pairs, device, most)
        texts = [len(batch["score_index"]) for batch in found]
        assert sum(texts) == 400 and max(texts) // 2 <= most
        assert max(batch["input_ids"].numel() for batch in found) <= 2048 + 401
        assert found[0]["input_ids"].shape[1] > found[-1]["input_ids"].shape[1]  # what does not fit shows at once


def test_rows_are_as_cheap_as_can_be() -> None:
    for lengths, limit, rows in (
        ([100, 300, 200], 1000, [[1], [2, 0]]),  # two full rows of 300 take less attention than one of 600
        ([300, 299, 2], 1000, [[0, 2], [1]]),  # and so do two of 302, three cells of padding included
        ([500, 100, 100, 100], 1000, [[0, 1, 2, 3]]),  # but not two of 500, of which one would be mostly padding
        ([500, 100, 100, 100], 500, [[0], [1, 2, 3]]),  # unless they must
        ([900, 450, 450], 500, [[0], [1, 2]]),  # a pair over the limit widens all rows, so they are filled
    ):
        assert assign_rows(lengths, limit) == rows


def assert_same(model: torch.nn.Module, args: RewardRecipeConfig, pairs: list[dict[str, Any]], limit: int) -> None:
    """One trainer pads the batch, one packs it into rows, one into a single row, where each text attends by itself.

    Scores and loss agree within the relative tolerance, each gradient within it times the norm of the whole gradient.
    """
    found, tolerance = [], TOLERANCE[next(model.parameters()).dtype]
    for options in ({}, {"max_tokens_per_row": limit}, {"max_tokens_per_row": math.inf}):
        trainer = tiny_trainer(model, args, pairs, **options)
        trainer.model.train().zero_grad()
        loss, outputs = trainer.compute_loss(trainer.model, trainer.data_collator(pairs), return_outputs=True)
        loss.backward()
        trained = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        found.append((outputs.logits.detach(), loss.detach(), trained))
    (scores, loss, gradients), *packed = found
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for packed_scores, packed_loss, packed_gradients in packed:
        assert packed_scores.shape == scores.shape == (2 * len(pairs), 1)
        assert (packed_scores - scores).abs().max() <= tolerance * scores.abs().max()
        assert (packed_loss - loss).abs() <= tolerance * loss.abs()
        for name, gradient in gradients.items():
            assert (packed_gradients[name] - gradient).norm() <= tolerance * whole, name


def with_adapter(model: PreTrainedModel) -> torch.nn.Module:
    """LoRA on every linear layer, with random weights: new ones would leave half of the gradients at 0."""
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("architecture", EXACT)
def test_packed_equals_plain(architecture: str, tmp_path: Path) -> None:
    """Corner cases and random pairs; rows of 48 tokens hold several pairs or one that is longer."""
    pairs = corner_pairs() + random_pairs(9)
    assert max(group_of(example).length for example in pairs) > 48
    assert_same(tiny_model(architecture, torch.float64), config(tmp_path), pairs, 48)


@pytest.mark.parametrize(("architecture", "dtype"), [("gpt2", torch.float64), ("llama", torch.float32)], ids=str)
def test_packed_equals_plain_with_margins_centring_and_checkpointing(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Of all weights, and of an adapter's."""
    model, args = tiny_model(architecture, dtype), config(tmp_path, center_rewards_coefficient=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model = with_adapter(model) if architecture == "llama" else model
    assert_same(model, args, random_pairs(9, seed=3, margins=True), 100)


@needs_real_data
def test_packed_equals_plain_on_real_pairs() -> None:
    """32 pairs of HH-RLHF in GPT-2's tokens, each text computed alone; the prompts make a good part of the texts."""
    tokenizer = load_tokenizer(str(REAL_DATA / "gpt2-tokenizer"))
    splits = {"test": load_pairs(str(REAL_DATA / "hh-rlhf" / "helpful-base"))["test"]}
    encoded = usable_pairs(encode_splits(splits, tokenizer, 512, "drop", [])["test"], "pairs", "mend them")
    pairs = list(encoded.select(range(32)))
    model = tiny_model("gpt2", torch.float64, vocab_size=len(tokenizer), n_positions=512).eval()
    plain = [text_score(model, pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    tap = ScoreTap(model, math.inf)
    for limit in (1024, math.inf):
        batch = PackedCollator(tokenizer.pad_token_id, limit)(pairs)
        with torch.no_grad():
            assert tap.forward(model, **batch).logits.flatten().tolist() == pytest.approx(plain, rel=1e-10)
    both, unique, padded = batch["tokens"].tolist()
    assert unique < 0.75 * both and both < padded
    for device in ("cpu", "cuda"):
        filled = torch.cat([batch["attention_mask"].flatten() for batch in batches(encoded, device, 64)])
        assert len(encoded) > 400 and filled.float().mean() > 0.97


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at it while tracing
@pytest.mark.parametrize("limit", [64, math.inf])
def test_the_tap_leaves_other_calls_alone_and_survives_dynamo(limit: float) -> None:
    """A model that trains packed can be called as ever, keeps no activations, and is untouched once let go.

    Graphs are captured without a compiler: what could break is the way the scores leave the model.
    """
    model, ids = tiny_model("gpt2"), torch.tensor([[5, 6, 7, EOS]])
    before = model(input_ids=ids)
    tap, batch = ScoreTap(model, limit), PackedCollator(PAD, limit)([pair([5, 6, 7], [5, 6, 8])])
    scores = tap.forward(model, **batch).logits
    assert scores[0].isclose(before.logits[0])
    assert torch.equal(model(input_ids=ids).logits, before.logits)
    assert not any(torch.is_tensor(value) for value in vars(tap).values())
    with pytest.raises(IndexError):
        tap.forward(model, **batch | {"input_ids": batch["input_ids"] + 1000})
    assert torch.equal(model(input_ids=ids).logits, before.logits)
    torch.testing.assert_close(tap.forward(torch.compile(model, backend="eager"), **batch).logits, scores)
    tap.remove()
    assert not model._forward_hooks and not model.score._forward_hooks
