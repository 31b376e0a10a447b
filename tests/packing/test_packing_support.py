"""Models for which packed scores would differ are found out, and looking does not change anything."""

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_packing import EXACT, REFUSED
from toys import corner_pairs, dataset, pair, random_pairs, tiny_model
from transformers import PreTrainedModel

from reward_recipes.packing import choose_packing, has_dropout, unsupported
from reward_recipes.packing import support as packing_support
from reward_recipes.run import UserError

LONGEST = 61  # tokens of the longest text in `data`


@pytest.fixture(params=[64, math.inf], ids=["rows", "one row"])
def limit(request: pytest.FixtureRequest) -> float:
    """Of a row, on a GPU and on a CPU."""
    return request.param


@pytest.fixture(scope="module")
def data() -> Dataset:
    return dataset([*random_pairs(20, longest=12), *corner_pairs()])


def assert_caught(model: PreTrainedModel, data: Dataset, reason: str, limit: float) -> None:
    """`auto` falls back with a warning, `true` fails with one line; both give the reason."""
    with pytest.warns(UserWarning, match=f"not packed, so training is slower: .*{reason}"):
        assert choose_packing("auto", model, data, LONGEST, limit) is None
    with pytest.raises(UserError, match=f"{reason}.*auto$"):
        choose_packing("true", model, data, LONGEST, limit)


@pytest.mark.parametrize("architecture", EXACT)
def test_causal_models_are_packed(architecture: str, data: Dataset, limit: float) -> None:
    """A window as long as the texts changes nothing."""
    window = {"sliding_window": LONGEST} if architecture == "mistral" else {}
    assert choose_packing("auto", tiny_model(architecture, **window), data, LONGEST, limit) == "shared"


def test_training_is_laid_out_as_dropout_and_the_recipe_say(
    data: Dataset, capsys: pytest.CaptureFixture[str], limit: float
) -> None:
    """In one line; `false` speaks of training alone, and is no warning where nothing can be packed."""
    still, dropping = tiny_model("gpt2"), tiny_model("gpt2")
    dropping.transformer.drop.p = 0.1
    assert (has_dropout(still), has_dropout(dropping)) == (False, True)
    for setting, dropout, layout in (("auto", True, "unshared"), ("true", True, "shared"), ("false", True, "padded")):
        assert choose_packing(setting, dropping, data, LONGEST, limit, dropout) == layout
        assert len(capsys.readouterr().out.splitlines()) == 1
    assert choose_packing("false", tiny_model("bert"), data, LONGEST, limit) is None


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        *((name, {}, reason) for name, reason in REFUSED.items()),
        ("mistral", {"sliding_window": 16}, "sliding window of 16 tokens below max_length 61"),
        ("llama", {"is_causal": False}, "whose packed scores differ"),  # no configuration says so; the scores do
        ("llama", {"attn_implementation": "eager"}, "'eager', where the mask of packed pairs needs sdpa"),
    ],
)
def test_other_ways_to_mix_tokens_are_caught(
    architecture: str, config: dict[str, Any], reason: str, data: Dataset, limit: float
) -> None:
    assert_caught(tiny_model(architecture, **config), data, reason, limit)


def test_a_window_that_the_configuration_hides_is_caught_on_long_texts(
    monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """Wherever the long pair stands; without it nothing tells the two apart, hence the look at the configuration."""
    monkeypatch.setattr(packing_support, "unsupported", lambda model, max_length: None)
    model, short, long = tiny_model("mistral", sliding_window=16), random_pairs(20, longest=12), pair(range(2, 32), [3])
    assert choose_packing("true", model, dataset(short), LONGEST, limit)
    for pairs in ([long, *short], [*short, long]):
        assert_caught(model, dataset(pairs), "MistralForSequenceClassification, whose packed scores differ", limit)


@pytest.mark.parametrize(("dtype", "training"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_the_comparison_leaves_no_trace(dtype: torch.dtype, training: bool, data: Dataset, limit: float) -> None:
    """Weights bit by bit, precision, mode, hooks, attention, and the random state of dropout and data order."""
    model = tiny_model("gpt2", dtype).train(training)
    model.transformer.drop.p = 0.5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert choose_packing("true", model, data, LONGEST, limit)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, before[name])
    assert all(module.training == training for module in model.modules())
    assert not model._forward_hooks and not model.score._forward_hooks
    assert model.config._attn_implementation == "sdpa"
    model.score.weight.data = torch.empty(0)
    assert "sharded" in unsupported(model, LONGEST)  # and then nothing can be compared
