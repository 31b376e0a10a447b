"""The scorer: each text scored as if alone, whatever stands beside it; replies to one prompt share its computation."""

from pathlib import Path

import pytest
import torch
from conftest import POSITIONS, save_reward_model
from peft import LoraConfig, get_peft_model
from toys import EOS, FIRST, text_score, tiny_model, tiny_tokenizer
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
from trl import ModelConfig

from reward_recipes.pairs import encode_texts, load_tokenizer
from reward_recipes.run import UserError
from reward_recipes.score import Scorer, load_scorer, peft_config
from reward_recipes.score import scorer as scoring


def word_ids(*lengths: int) -> list[list[int]]:
    return [[FIRST + (3 * place + length) % 60 for place in range(length)] + [EOS] for length in lengths]


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "qwen3", "bloom", "mistral"])
def test_a_score_does_not_depend_on_its_neighbours(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts alone, and replies to one prompt, more of them than a row holds.

    Bloom's ALiBi cannot be packed, and no window that is shorter than a text.
    """
    monkeypatch.setattr(scoring, "PACKED_ROW", 64)
    model = tiny_model(architecture, **{"sliding_window": 8} if architecture == "mistral" else {})
    judge, prompt = Scorer(model.eval(), tiny_tokenizer(), max_length=64), word_ids(20)[0][:-1]
    groups = [[prompt + reply for reply in word_ids(*range(9), 30)], [], word_ids(4, 4), [[*prompt, EOS]]]
    groups += [[ids] for ids in word_ids(3, 50, 1, 17, 17, 0, 33)]
    expected = [[text_score(judge.model, ids) for ids in group] for group in groups]
    for cells in (1, 40, 4096):
        judge.cells = cells
        for found, alone in zip(judge.score_ids(groups), expected, strict=True):
            assert found == pytest.approx(alone, abs=1e-5)
    assert (judge._tap is None) == (architecture in ("bloom", "mistral"))


def test_a_shared_prompt_is_computed_once() -> None:
    judge, prompt, cells = Scorer(tiny_model("gpt2").eval(), tiny_tokenizer(), max_length=64), word_ids(40)[0][:-1], []
    group = [prompt + reply for reply in word_ids(*range(1, 9))]
    judge.score_ids([group])  # which finds out whether packing is exact
    judge.model.transformer.wte.register_forward_hook(lambda module, ids, found: cells.append(ids[0].numel()))
    judge.score_ids([group])
    assert sum(cells) == 40 + sum(range(1, 9)) + 8


def test_overlong_texts_follow_the_training(gpt2_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    long = "Yes, of course. What do you need? " * 20
    kept = load_scorer(str(reward_dir))
    assert (kept.max_length, kept.overlong) == (40, "keep_end")
    ids = encode_texts(kept.tokenizer, [long])[0]
    assert kept.score([long, "No."])[0] == pytest.approx(text_score(kept.model, ids[-40:]), abs=1e-5)
    dropped = load_scorer(str(save_reward_model(gpt2_dir, tmp_path / "drop", max_length=40, overlong="drop")))
    groups = dropped.score_groups([["No.", long, ""], [long]])
    assert [[score is None for score in group] for group in groups] == [[False, True, False], [True]]
    other = load_scorer(str(save_reward_model(gpt2_dir, tmp_path / "other")))
    assert (other.max_length, other.overlong) == (POSITIONS, "drop")


def test_half_precision_weights_keep_a_float32_head(reward_dir: Path) -> None:
    judge, full = load_scorer(str(reward_dir), dtype="bfloat16"), load_scorer(str(reward_dir))
    assert judge.model.dtype == torch.bfloat16
    groups = [["", "Yes."], [f"\n\nHuman: How do I bake bread?\n\nAssistant: {reply}" for reply in ("So.", "Not.")]]
    for rounded, exact in zip(judge.score_groups(groups), full.score_groups(groups), strict=True):
        assert rounded == pytest.approx(exact, abs=0.1)
        assert judge.model.score.weight.dtype == torch.bfloat16 and rounded != torch.tensor(rounded).bfloat16().tolist()


def test_what_is_no_reward_model_is_refused(gpt2_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "broken", tmp_path / "more"):
        save_reward_model(gpt2_dir, folder)
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "gp')
    tokenizer = load_tokenizer(str(tmp_path / "more"))
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(tmp_path / "more")
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(GPT2LMHeadModel.from_pretrained(gpt2_dir), adapter).save_pretrained(tmp_path / "adapter")
    load_tokenizer(str(gpt2_dir)).save_pretrained(tmp_path / "adapter")
    for folder, dtype, complaint in (
        (gpt2_dir, "float32", r"a trained GPT2ForSequenceClassification, found no weights of score\.weight"),
        (tmp_path / "nowhere", "float32", "nowhere"),
        (reward_dir, "int8", "dtype: expected float32"),
        (tmp_path / "broken", "float32", "broken"),
        (tmp_path / "more", "float32", "at most 321 tokens, found 323"),
        (tmp_path / "adapter", "float32", "expected a reward model's adapter"),
    ):
        with pytest.raises(UserError, match=complaint):
            load_scorer(str(folder), dtype=dtype)
    judge = load_scorer(str(reward_dir))
    judge.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="expected finite scores"):
        judge.score(["Yes."])


def test_an_adapter_is_merged_into_the_revision_it_was_trained_on(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another tool, whose base model takes EOS for padding: plain transformers reads a text before it."""
    base, folder = GPT2ForSequenceClassification.from_pretrained(gpt2_dir, num_labels=1), tmp_path / "base"
    base.config.pad_token_id = base.config.eos_token_id
    base.save_pretrained(folder)
    settings, asked, load = ModelConfig(str(folder), model_revision="v2", use_peft=True), [], scoring.load_classifier
    adapter = get_peft_model(GPT2ForSequenceClassification.from_pretrained(folder), peft_config(settings)).eval()
    adapter.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(gpt2_dir))
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("Yes.<|endoftext|>", add_special_tokens=False, return_tensors="pt")
    monkeypatch.setattr(
        scoring, "load_classifier", lambda name, **options: asked.append(options["revision"]) or load(name, **options)
    )
    scorer = load_scorer(str(tmp_path))
    assert asked == ["v2"]
    assert scorer.score(["Yes.<|endoftext|>"]) == pytest.approx([adapter(**ids).logits.item()], abs=1e-5)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=f"expected weights that fit {folder}"):
        load_scorer(str(tmp_path))
