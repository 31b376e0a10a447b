"""The scorer: each text scored as if alone, whatever stands beside it; replies to one prompt share its computation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, POSITIONS, hh_pairs, save_reward_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from toys import EOS, FIRST, text_score, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, GPT2ForSequenceClassification, GPT2LMHeadModel
from trl import ModelConfig

from reward_recipes.pairs.encode import encode_pairs
from reward_recipes.pairs.tokens import encode_texts, load_tokenizer
from reward_recipes.run.errors import UserError
from reward_recipes.score import scorer as scoring
from reward_recipes.score.model import peft_config
from reward_recipes.score.scorer import Scorer, load_scorer

TEXTS = ["", "Yes.", "\n\nHuman: How?\n\nAssistant: Mix flour and water.", "a b c d", "Yes, of course. " * 3]


def scorer(architecture: str = "gpt2", overlong: str = "drop", max_length: int = 64, **config: object) -> Scorer:
    return Scorer(tiny_model(architecture, **config).eval(), tiny_tokenizer(), max_length, overlong)


def word_ids(*lengths: int) -> list[list[int]]:
    return [[FIRST + (3 * place + length) % 60 for place in range(length)] + [EOS] for length in lengths]


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "qwen3"])
@pytest.mark.parametrize("cells", [1, 40, 4096])
def test_a_score_does_not_depend_on_its_neighbours(architecture: str, cells: int) -> None:
    judge = scorer(architecture)
    judge.cells = cells
    texts = word_ids(3, 50, 1, 17, 17, 0, 33)
    alone = [text_score(judge.model, ids) for ids in texts]
    assert [scores[0] for scores in judge.score_ids([[ids] for ids in texts])] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bloom"])
def test_replies_to_one_prompt_score_as_alone(architecture: str) -> None:
    """Bloom's ALiBi cannot be packed and is scored text by text."""
    judge = scorer(architecture)
    prompt = word_ids(20)[0][:-1]
    groups = [[prompt + reply for reply in word_ids(2, 9, 0, 30)], [], word_ids(4, 4), [[*prompt, EOS]]]
    scores = judge.score_ids(groups)
    assert [len(group) for group in scores] == [4, 0, 2, 1]
    for group, found in zip(groups, scores, strict=True):
        assert found == pytest.approx([text_score(judge.model, ids) for ids in group], abs=1e-5)
    assert (judge._tap is not None) == (architecture != "bloom")


def test_a_shared_prompt_is_computed_once() -> None:
    judge = scorer()
    prompt = word_ids(40)[0][:-1]
    group = [prompt + reply for reply in word_ids(*range(1, 9))]
    judge.score_ids([group])
    cells = []
    judge.model.register_forward_pre_hook(
        lambda _, args, kwargs: cells.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    judge.score_ids([group])
    assert sum(cells) == 40 + sum(range(1, 9)) + 8


def test_more_replies_than_a_row_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_recipes.score.scorer.PACKED_ROW", 64)
    judge = scorer()
    group = [word_ids(30)[0][:-1] + reply for reply in word_ids(*range(12))]
    assert judge.score_ids([group])[0] == pytest.approx([text_score(judge.model, ids) for ids in group], abs=1e-5)


def test_a_sliding_window_below_the_texts_is_not_packed() -> None:
    judge = scorer("mistral", sliding_window=8)
    group = [word_ids(30)[0][:-1] + reply for reply in word_ids(1, 5)]
    assert judge.score_ids([group])[0] == pytest.approx([text_score(judge.model, ids) for ids in group], abs=1e-5)
    assert judge._tap is None


def test_text_ends_in_one_eos_and_special_tokens_in_it_are_text(reward_dir: Path) -> None:
    judge = load_scorer(str(reward_dir))
    plain, ended, twice = judge.score(["Yes.", "Yes.<|endoftext|>", "Yes.<|endoftext|><|endoftext|>"])
    assert plain == ended == twice
    inside, pad_inside = judge.score(["Yes.<|endoftext|> No.", "Yes.<|pad|> No."])
    ids = judge.encode(["Yes.<|endoftext|> No.", "Yes.<|pad|> No."])
    assert all(text.count(0) == 1 and judge.tokenizer.pad_token_id not in text for text in ids)
    assert len({plain, inside, pad_inside}) == 3


def test_scores_are_those_of_plain_transformers(reward_dir: Path) -> None:
    judge = load_scorer(str(reward_dir))
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir).eval()
    expected = []
    for ids in encode_texts(judge.tokenizer, TEXTS):
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([ids[-40:]])).logits.item())
    assert judge.score(TEXTS) == pytest.approx(expected, abs=1e-5)


def test_overlong_texts_follow_the_training(gpt2_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    long = "Yes, of course. What do you need? " * 20
    kept = load_scorer(str(reward_dir))
    assert (kept.max_length, kept.overlong) == (40, "keep_end")
    ids = encode_texts(kept.tokenizer, [long])[0]
    assert kept.score([long, "No."])[0] == pytest.approx(text_score(kept.model, ids[-40:]), abs=1e-5)
    dropped = load_scorer(str(save_reward_model(gpt2_dir, tmp_path / "drop", max_length=40, overlong="drop")))
    assert dropped.score([long, "No."])[0] is None
    assert dropped.score_groups([["No.", long, "Yes."], [long]])[0][1] is None
    assert dropped.score_groups([["No.", long, "Yes."], [long]])[1] == [None]
    other = load_scorer(str(save_reward_model(gpt2_dir, tmp_path / "other")))
    assert (other.max_length, other.overlong) == (POSITIONS, "drop")


def test_pairs_score_as_their_texts(reward_dir: Path) -> None:
    judge = load_scorer(str(reward_dir))
    pairs = Dataset.from_list(hh_pairs(9))
    scores = judge.score_pairs(encode_pairs(pairs, judge.tokenizer, 128, "drop", []))
    judge.max_length = 128
    expected = [[judge.score([pair[side]])[0] for side in ("chosen", "rejected")] for pair in pairs]
    assert scores == pytest.approx(torch.tensor(expected).numpy(), abs=1e-5)


def test_dialogues_go_through_the_chat_template(chat_dir: Path, tmp_path: Path) -> None:
    judge = load_scorer(str(save_reward_model(chat_dir, tmp_path / "chat")))
    judge.tokenizer.chat_template = CHATML
    dialogue = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    text = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"
    ids = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert judge.score([dialogue]) == pytest.approx([text_score(judge.model, ids)], abs=1e-5)


def test_half_precision_weights_keep_a_float32_head(reward_dir: Path) -> None:
    judge = load_scorer(str(reward_dir), dtype="bfloat16")
    assert judge.model.dtype == torch.bfloat16
    full = load_scorer(str(reward_dir)).score(TEXTS)
    assert judge.score(TEXTS) == pytest.approx(full, abs=0.1)
    prompt = "\n\nHuman: How do I bake bread?\n\nAssistant:"
    assert len(judge.score_groups([[prompt + " So.", prompt + " Not."]])[0]) == 2


def test_what_is_no_reward_model_is_refused(gpt2_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"score\.weight"):
        load_scorer(str(gpt2_dir))
    with pytest.raises(UserError, match="nowhere"):
        load_scorer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="dtype: expected one of float32"):
        load_scorer(str(reward_dir), dtype="int8")
    broken = save_reward_model(gpt2_dir, tmp_path / "broken")
    (broken / "config.json").write_text(json.dumps({"model_type": "gpt2"})[:-3])
    with pytest.raises(UserError):
        load_scorer(str(broken))


def test_scores_that_are_no_numbers_are_an_error(gpt2_dir: Path, tmp_path: Path) -> None:
    judge = load_scorer(save_reward_model(gpt2_dir, tmp_path / "broken"))
    with torch.no_grad():
        judge.model.score.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="expected finite scores"):
        judge.score(["Yes."])


def test_words_that_the_model_never_learned_are_refused(gpt2_dir: Path, tmp_path: Path) -> None:
    folder = save_reward_model(gpt2_dir, tmp_path / "more")
    tokenizer = load_scorer(str(folder)).tokenizer
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="tokenizer of at most 321 tokens, the model's, found 322"):
        load_scorer(str(folder))


def test_an_adapter_is_merged_into_the_revision_it_was_trained_on(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelConfig(str(gpt2_dir), model_revision="v2", use_peft=True)
    base = GPT2ForSequenceClassification.from_pretrained(gpt2_dir, num_labels=1)
    get_peft_model(base, peft_config(settings, base)).save_pretrained(tmp_path)
    load_tokenizer(str(gpt2_dir)).save_pretrained(tmp_path)
    asked: list[Any] = []
    load = scoring.load_classifier
    monkeypatch.setattr(
        scoring, "load_classifier", lambda name, **options: asked.append(options["revision"]) or load(name, **options)
    )
    load_scorer(str(tmp_path))
    assert asked == ["v2"]


def test_an_adapter_without_a_head_is_refused(gpt2_dir: Path, tmp_path: Path) -> None:
    policy = get_peft_model(
        GPT2LMHeadModel.from_pretrained(gpt2_dir),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True),
    )
    policy.save_pretrained(tmp_path)
    load_tokenizer(str(gpt2_dir)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected a reward model's adapter"):
        load_scorer(str(tmp_path))
