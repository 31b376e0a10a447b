"""The model gives one float32 score, read at EOS; a wrong folder is told in one line."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import POSITIONS, save_reward_model
from safetensors.torch import load_file
from torch import nn
from toys import config, tiny_model
from transformers import AutoModelForSequenceClassification, MambaConfig, PreTrainedModel
from trl import ModelConfig

from reward_recipes.packing import pad_texts
from reward_recipes.pairs import encode_texts, load_tokenizer
from reward_recipes.run import UserError
from reward_recipes.score import load_reward_model, peft_config
from reward_recipes.score.model import Float32Score


def load(folder: Path | str, tokenizer: Path | None = None, **fields: Any) -> PreTrainedModel:
    known = load_tokenizer(str(tokenizer or folder))
    return load_reward_model(ModelConfig(str(folder)), config("unused", **fields), known)


def test_a_new_head_is_seeded_and_a_trained_one_kept(gpt2_dir: Path, tmp_path: Path) -> None:
    first, again, other = (load(gpt2_dir, seed=seed, max_length=POSITIONS) for seed in (1, 1, 2))
    assert type(first.score) is Float32Score and first.score.weight.shape == (1, 32)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert torch.equal(first.transformer.h[0].attn.c_attn.weight, other.transformer.h[0].attn.c_attn.weight)
    trained = save_reward_model(gpt2_dir, tmp_path)
    assert torch.equal(load(trained).score.weight, load_file(trained / "model.safetensors")["score.weight"])


@pytest.mark.parametrize("family", ["gpt2_dir", "llama_dir"])
def test_scores_are_read_at_eos_which_is_trained(family: str, request: pytest.FixtureRequest) -> None:
    """GPT-2 gets a new pad token. Llama's was its EOS, whose embedding would get no gradient as a padding index."""
    path = request.getfixturevalue(family)
    tokenizer, model = load_tokenizer(str(path)), load(path).eval()
    embedding = model.get_input_embeddings()
    assert embedding.num_embeddings == len(tokenizer) == 321
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = encode_texts(tokenizer, ["Yes, of course.", "How do I bake bread? Mix flour and water."])
    padded = model(**pad_texts(texts, tokenizer.pad_token_id)).logits[:, 0]
    for ids, score in zip(texts, padded, strict=True):
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        at_each_token = hidden @ model.score.weight[0]
        torch.testing.assert_close(score, at_each_token[-1])
        assert (at_each_token[:-1] - score).abs().min() > 1e-4
    padded.sum().backward()
    assert embedding.weight.grad[tokenizer.eos_token_id].norm() > 0
    assert embedding.weight.grad[tokenizer.pad_token_id].norm() == 0


def test_the_head_scores_in_float32_at_least() -> None:
    """In bf16 numbers from 2 to 4 are 1/64 apart, so 200 scores from 2 to 2.1 would fall on 8 values."""
    head, hidden = nn.Linear(8, 1), torch.linspace(0, 0.05, 200)[:, None].expand(-1, 8)
    head.__class__ = Float32Score
    nn.init.constant_(head.weight, 0.25)
    nn.init.constant_(head.bias, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        exact, rounded = head(hidden), nn.functional.linear(hidden, head.weight, head.bias)
        whole = tiny_model("gpt2")(input_ids=torch.tensor([[5, 6, 0]])).logits
    assert (exact.dtype, whole.dtype) == (torch.float32, torch.float32)
    assert len(exact.unique()) == 200 and len(rounded.unique()) <= 8
    torch.testing.assert_close(exact[:, 0], 2 + 2 * hidden[:, 0])
    assert head.double()(hidden.double()).dtype == torch.float64


def test_a_wrong_source_is_told_in_one_line(gpt2_dir: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(gpt2_dir, num_labels=2).save_pretrained(tmp_path / "two")
    MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4).save_pretrained(tmp_path / "mamba")
    for source, length, complaint in (
        (tmp_path / "two", 64, "num_labels=1, found weights of another shape"),
        (tmp_path / "mamba", 64, "MambaConfig.* for this kind of AutoModel: AutoModelForSequenceClassification"),
        (tmp_path / "no", 64, f"found nothing at '{tmp_path}/no'"),
        ("some/model", 64, "without hub access, point model_name_or_path at a local folder"),
        (gpt2_dir, POSITIONS + 1, f"max_length: expected at most {POSITIONS}.*found {POSITIONS + 1}"),
    ):
        with pytest.raises(UserError, match=complaint) as caught:
            load(source, gpt2_dir, max_length=length)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_the_way_out_of_a_pickle_keeps_the_head(gpt2_dir: Path, tmp_path: Path) -> None:
    """Weights of `pytorch_model.bin` alone: of a reward model, and of a language model, which has no head."""
    whole = {"old": save_reward_model(gpt2_dir, tmp_path / "old"), "base": shutil.copytree(gpt2_dir, tmp_path / "base")}
    for name, folder in whole.items():
        weights = load_file(folder / "model.safetensors")
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"expected weights in model\.safetensors") as caught:
            load(folder, gpt2_dir)
        way_out = str(caught.value).partition("that you trust: ")[2].replace("NEW", f"{str(tmp_path / 'new')!r}")
        eval(way_out, {"transformers": transformers})
        saved = load_file(tmp_path / "new" / "model.safetensors")
        assert ("score.weight" in saved) == (name == "old")
        assert all(torch.equal(saved[key], weights[key]) for key in saved)


def test_lora_layers_are_those_named() -> None:
    """One name is matched as a name, not as a pattern of whole paths."""
    for names in (["c_attn"], ["c_attn", "c_fc"], None):
        adapter = peft_config(ModelConfig("any", model_revision="v2", use_peft=True, lora_target_modules=names))
        assert (adapter.task_type, adapter.revision) == ("SEQ_CLS", "v2")
        assert adapter.target_modules == (names and set(names))
    assert peft_config(ModelConfig("any")) is None
