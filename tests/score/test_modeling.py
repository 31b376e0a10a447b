"""The model gives one float32 score, read at EOS; adapters merge into it; a wrong folder is told in one line."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import POSITIONS
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from toys import config, dataset, random_pairs, tiny_model
from transformers import AutoModelForSequenceClassification, MambaConfig, MambaForCausalLM, PreTrainedModel
from trl import ModelConfig

from reward_recipes.packing.collators import PaddedCollator
from reward_recipes.pairs.tokens import encode_texts, load_tokenizer
from reward_recipes.run.errors import UserError
from reward_recipes.score.model import Float32Score, load_reward_model, merge_adapter, peft_config
from reward_recipes.trainer import ExactRewardTrainer


def load(folder: Path, **fields: object) -> PreTrainedModel:
    return load_reward_model(ModelConfig(str(folder)), config("unused", **fields), load_tokenizer(str(folder)))


def scores(model: torch.nn.Module, texts: list[list[int]], pad: int) -> torch.Tensor:
    """(n,) scores of texts padded to the longest, in eval mode."""
    examples = [{"chosen_ids": ids, "rejected_ids": ids, "prefix": 0, "row": 0, "subset": 0} for ids in texts]
    batch = PaddedCollator(pad_token_id=pad)(examples)
    with torch.no_grad():
        out = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return out.logits[: len(texts), 0]


def test_a_language_model_gets_a_seeded_head(gpt2_dir: Path) -> None:
    first, again, other = (load(gpt2_dir, seed=seed) for seed in (1, 1, 2))
    assert type(first.score) is Float32Score
    assert first.score.weight.shape == (1, 32)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert torch.equal(first.transformer.h[0].attn.c_attn.weight, other.transformer.h[0].attn.c_attn.weight)


def test_a_reward_model_keeps_its_head(gpt2_dir: Path, tmp_path: Path) -> None:
    model = load(gpt2_dir, seed=1)
    model.save_pretrained(tmp_path)
    load_tokenizer(str(gpt2_dir)).save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, seed=2).score.weight, model.score.weight)


@pytest.mark.parametrize("folder", ["gpt2_dir", "llama_dir"])
def test_scores_are_read_at_eos(folder: str, request: pytest.FixtureRequest) -> None:
    """GPT-2 gets a new pad token, Llama's pad was its EOS; either way score = hidden state at EOS times weight."""
    path = request.getfixturevalue(folder)
    tokenizer, model = load_tokenizer(str(path)), load(path)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 321
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = encode_texts(tokenizer, ["Yes, of course.", "How do I bake bread? Mix flour and water."])
    padded = scores(model, texts, tokenizer.pad_token_id)
    for ids, score in zip(texts, padded, strict=True):
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        at_each_token = hidden @ model.score.weight[0]
        torch.testing.assert_close(score, at_each_token[-1])
        assert (at_each_token[:-1] - score).abs().min() > 1e-4


def test_an_eos_that_was_padding_is_trained(llama_dir: Path) -> None:
    """An embedding's padding index stops its gradient, and Llama's was EOS."""
    tokenizer, model = load_tokenizer(str(llama_dir)), load(llama_dir)
    model(input_ids=torch.tensor(encode_texts(tokenizer, ["Yes"]))).logits.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[tokenizer.eos_token_id].norm() > 0
    assert model.get_input_embeddings().padding_idx == tokenizer.pad_token_id


def near_two() -> tuple[Float32Score, torch.Tensor]:
    """A head whose scores of 200 hidden states lie between 2 and 2.1, 1/2000 apart."""
    head = torch.nn.Linear(8, 1)
    head.__class__ = Float32Score
    torch.nn.init.constant_(head.weight, 0.25)
    torch.nn.init.constant_(head.bias, 2.0)
    return head, torch.linspace(0, 0.05, 200)[:, None].expand(-1, 8)


def test_the_head_scores_in_float32_under_autocast() -> None:
    """In bf16 numbers from 2 to 4 are 1/64 apart, so 200 scores from 2 to 2.1 would fall on 8 values."""
    head, hidden = near_two()
    with torch.autocast("cpu", torch.bfloat16):
        exact = head(hidden)
        rounded = torch.nn.functional.linear(hidden, head.weight, head.bias)
        inside = torch.nn.functional.linear(hidden, head.weight).dtype
    assert (exact.dtype, rounded.dtype, inside) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert len(exact.unique()) == 200
    assert len(rounded.unique()) <= 8
    torch.testing.assert_close(exact[:, 0], 2 + 2 * hidden[:, 0])


def test_a_model_under_autocast_gives_float32_scores() -> None:
    model = tiny_model("gpt2")
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=torch.tensor([[5, 6, 0]])).logits
        hidden = model.transformer.h[0].attn.c_attn(torch.ones(1, 1, 32))
    assert (logits.dtype, hidden.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("weights", "result"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_head_never_computes_in_less_than_float32(weights: torch.dtype, result: torch.dtype) -> None:
    head, hidden = near_two()
    assert head.to(weights)(hidden.to(weights)).dtype == result
    head.bias = None
    assert head(hidden.to(weights)).dtype == result


def error(folder: Path | str, tokenizer: Path, **fields: object) -> str:
    """The one line that the user reads."""
    with pytest.raises(UserError) as caught:
        load_reward_model(ModelConfig(str(folder)), config("unused", **fields), load_tokenizer(str(tokenizer)))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300
    return text


def test_one_label_may_be_said(gpt2_dir: Path) -> None:
    assert load(gpt2_dir, model_init_kwargs={"num_labels": 1}).score.out_features == 1


def test_a_head_of_two_labels_is_refused(gpt2_dir: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(gpt2_dir, num_labels=2).save_pretrained(tmp_path)
    assert "expected a head with num_labels=1, found weights of another shape" in error(tmp_path, gpt2_dir)


def test_an_architecture_without_a_head_is_refused(gpt2_dir: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    MambaForCausalLM(MambaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    assert "expected an architecture with a sequence-classification head" in error(tmp_path, gpt2_dir)


def test_texts_longer_than_the_positions_are_refused(gpt2_dir: Path) -> None:
    found = f"max_length: expected at most {POSITIONS}, the positions of {gpt2_dir}, found {POSITIONS + 1}"
    assert error(gpt2_dir, gpt2_dir, max_length=POSITIONS + 1) == found
    assert load(gpt2_dir, max_length=POSITIONS)


def test_a_missing_folder_is_told(gpt2_dir: Path, tmp_path: Path) -> None:
    assert f"a hub id or a path that is there, found nothing at '{tmp_path}/no'" in error(tmp_path / "no", gpt2_dir)


def test_a_name_that_is_not_in_the_cache_is_told(gpt2_dir: Path) -> None:
    assert "without hub access, point model_name_or_path at a local folder" in error("some/model", gpt2_dir)


def test_a_folder_without_weights_is_told(gpt2_dir: Path, tmp_path: Path) -> None:
    shutil.copy(gpt2_dir / "config.json", tmp_path)
    assert "safetensors" in error(tmp_path, gpt2_dir)


def test_weights_of_another_model_are_refused(gpt2_dir: Path, llama_dir: Path, tmp_path: Path) -> None:
    shutil.copy(llama_dir / "config.json", tmp_path)
    shutil.copy(gpt2_dir / "model.safetensors", tmp_path)
    assert "expected the weights of LlamaForSequenceClassification, found none for" in error(tmp_path, gpt2_dir)


@pytest.mark.parametrize("names", [["c_attn"], ["c_attn", "c_fc"], None])
def test_lora_layers_are_those_named(names: list[str] | None) -> None:
    """One name is matched as a name, not as a pattern of whole paths."""
    settings = ModelConfig("any", model_revision="v2", use_peft=True, lora_target_modules=names)
    adapter = peft_config(settings, nn.Linear(1, 1))
    assert (adapter.task_type, adapter.revision) == ("SEQ_CLS", "v2")
    assert adapter.target_modules == (names and set(names))


def test_without_use_peft_there_is_no_adapter() -> None:
    assert peft_config(ModelConfig("any"), nn.Linear(1, 1)) is None


@pytest.mark.parametrize("folder", ["gpt2_dir", "llama_dir"])
def test_an_adapter_trains_its_head_and_merges(folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Head trained, saved with the adapter, and in the merged model, which plain transformers scores alike."""
    path = request.getfixturevalue(folder)
    tokenizer = load_tokenizer(str(path))
    model_args = ModelConfig(str(path), use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    args = config(tmp_path / "run", max_steps=4, learning_rate=1e-2, per_device_train_batch_size=8)
    pairs = [pair | {"rejected_ids": [*pair["rejected_ids"][:-2], 7, 0]} for pair in random_pairs(32)]
    model = load_reward_model(model_args, args, tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = ExactRewardTrainer(
        model=model,
        args=args,
        train_dataset=dataset(pairs),
        processing_class=tokenizer,
        peft_config=peft_config(model_args, model),
        max_tokens_per_row=96,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (head,) = (tensor for name, tensor in adapter.items() if name.endswith("score.weight"))
    assert (head - before["score.weight"]).abs().max() > 1e-3
    assert any("lora_B" in name and tensor.abs().max() > 1e-3 for name, tensor in adapter.items())

    merged = merge_adapter(tmp_path / "adapter", model_args, args, tokenizer)
    assert not isinstance(merged, PeftModel)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert set(plain.state_dict()) == set(before)
    texts = [pair["chosen_ids"] for pair in pairs[:8]]
    trained = scores(trainer.model, texts, tokenizer.pad_token_id)
    torch.testing.assert_close(scores(plain, texts, plain.config.pad_token_id), trained, rtol=1e-5, atol=1e-5)
    untrained = scores(load_reward_model(model_args, args, tokenizer), texts, tokenizer.pad_token_id)
    assert (untrained - trained).abs().max() > 0.01
