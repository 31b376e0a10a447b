"""Models for which packed scores would differ are found out, and looking does not change anything."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from test_packing import EXACT
from toys import corner_pairs, dataset, pair, random_pairs, tiny_model
from transformers import PreTrainedModel

from reward_recipes.packing import support as packing_support
from reward_recipes.packing.support import _telling_pairs, choose_packing, unsupported
from reward_recipes.run.errors import UserError

LONGEST = 61  # tokens of the longest text in `data`


@pytest.fixture(scope="module")
def data() -> Dataset:
    return dataset([*random_pairs(20, longest=12), *corner_pairs()])


def assert_caught(model: PreTrainedModel, data: Dataset, reason: str) -> None:
    """`auto` falls back with one warning, `true` fails with one line; both give the reason."""
    with pytest.warns(UserWarning, match=f"not packed, so training is slower: .*{reason}") as caught:
        assert choose_packing("auto", model, data, LONGEST, 64) is False
    assert len(caught) == 1
    with pytest.raises(UserError, match=f"expected a model that can be packed, found .*{reason}.*auto$"):
        choose_packing("true", model, data, LONGEST, 64)


@pytest.mark.parametrize("architecture", EXACT)
def test_causal_models_are_packed(architecture: str, data: Dataset) -> None:
    with warnings.catch_warnings(action="error"):
        assert choose_packing("true", tiny_model(architecture), data, LONGEST, 64)
        assert choose_packing("auto", tiny_model(architecture), data, LONGEST, 64)


def test_false_does_not_even_look() -> None:
    assert choose_packing("false", None, None, 0, 0) is False


def test_a_window_shorter_than_the_texts_is_caught(data: Dataset) -> None:
    assert_caught(tiny_model("mistral", sliding_window=16), data, "sliding window of 16 tokens below max_length 61")


def test_a_window_as_long_as_the_texts_changes_nothing(data: Dataset) -> None:
    assert choose_packing("true", tiny_model("mistral", sliding_window=LONGEST), data, LONGEST, 64)


@pytest.mark.parametrize("longest_at", [0, 20])
def test_a_window_that_the_configuration_hides_is_caught_on_long_texts(
    longest_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the long pair stands; without it nothing tells the two apart, hence the look at the configuration."""
    monkeypatch.setattr(packing_support, "unsupported", lambda model, max_length: None)
    model = tiny_model("mistral", sliding_window=16)
    pairs = random_pairs(20, longest=12)
    assert choose_packing("true", model, dataset(pairs), LONGEST, 64)
    long = pair(list(range(2, 32)), list(range(3, 33)))
    pairs.insert(longest_at, long)
    assert_caught(model, dataset(pairs), "MistralForSequenceClassification, whose packed scores differ")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bloom", "BloomForSequenceClassification, which has no sdpa attention"),  # ALiBi
        ("falcon", "FalconForSequenceClassification, which cannot score packed rows"),  # ALiBi, with sdpa
        ("bert", "BertForSequenceClassification, which has no score for every token"),
        ("roberta", "RobertaForSequenceClassification, which has no score for every token"),
        ("qwen3_next", "layers of type linear_attention"),
    ],
)
def test_other_ways_to_mix_tokens_are_caught(architecture: str, reason: str, data: Dataset) -> None:
    assert_caught(tiny_model(architecture), data, reason)


def test_attention_to_later_tokens_is_caught(data: Dataset) -> None:
    """Nothing in this configuration says so; the scores do."""
    assert_caught(tiny_model("llama", is_causal=False), data, "whose packed scores differ")


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
def test_attention_without_the_mask_is_named(implementation: str, data: Dataset) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = implementation
    assert_caught(model, data, f"attn_implementation '{implementation}', which does not take the mask.*set .* to sdpa")


def test_weights_that_cannot_be_compared_are_named() -> None:
    model = tiny_model("llama")
    model.is_quantized = True
    assert "quantised" in unsupported(model, LONGEST)
    del model.is_quantized
    model.score.weight.data = torch.empty(0)
    assert "sharded" in unsupported(model, LONGEST)


@pytest.mark.parametrize(
    ("device", "kind", "caught"),
    [
        ("cuda", DistributedType.NO, True),
        ("cuda", DistributedType.MULTI_GPU, False),
        ("cpu", DistributedType.NO, False),
    ],
)
def test_rows_are_not_split_over_gpus(
    device: str, kind: DistributedType, caught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(device=torch.device(device), distributed_type=kind)
    monkeypatch.setattr(packing_support, "PartialState", lambda: state)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ("2 GPUs in one process" in str(unsupported(tiny_model("gpt2"), LONGEST))) == caught


def test_the_pairs_that_tell_most_are_compared() -> None:
    """Layouts of 3 (four times), 12, 12, 20, 19 and 12 tokens, texts of 2, 10, 6, 10, 10 and 10: 5 were cut off."""

    def lengths(chosen: int, rejected: int, prefix: int) -> dict[str, Any]:
        return {"chosen_length": chosen, "rejected_length": rejected, "prefix": prefix}

    short = [lengths(2, 2, 1)] * 4
    rows = [*short, lengths(10, 6, 4), lengths(6, 6, 0), lengths(10, 10, 0), lengths(10, 9, 0), lengths(15, 14, 7)]
    # The first two; 6 and 7 for their layouts; 4 and 6 for their texts, as the earliest of the longest.
    assert _telling_pairs(Dataset.from_list(rows), 10) == [0, 1, 4, 6, 7]
    assert _telling_pairs(Dataset.from_list(rows[:1]), 10) == [0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_comparison_leaves_no_trace(dtype: torch.dtype, training: bool, data: Dataset) -> None:
    """Weights bit by bit, precision, mode, hooks and the random state that dropout and data order come from."""
    model = tiny_model("gpt2", dtype).train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert choose_packing("true", model, data, LONGEST, 64)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, before[name])
    assert all(module.training == training for module in model.modules())
    assert not model._forward_hooks and not model.score._forward_hooks
