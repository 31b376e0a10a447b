"""Ids of texts and dialogues: EOS once and last, whatever the data hold, and never a pad token."""

import logging
from pathlib import Path

import pytest
from conftest import CHATML, bpe
from tokenizers import processors
from transformers import GPT2Config, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import ModelConfig

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.pairs.tokens import encode_dialogues, encode_texts, load_recipe_tokenizer, load_tokenizer
from reward_recipes.run.errors import UserError

QUESTION = {"role": "user", "content": "Why?"}


def answer(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def save(folder: Path, special: list[str], template: str | None = None, **named: object) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(special), **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids with special tokens read as such and nothing added, as a reference."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("plain", "plain"),
        ("", ""),
        ("ends{eos}", "ends"),
        ("ends{eos}{eos}", "ends"),
        ("ends{eos}\n", "ends"),
        ("ends {eos} {eos}\n\n", "ends "),
        ("middle{eos}goes on", "middle{eos}goes on"),
        ("{eos}first", "{eos}first"),
        ("trailing space \n", "trailing space \n"),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2_dir", "llama_dir"])
def test_text_ends_in_the_one_eos(kind: str, text: str, kept: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    eos = tokenizer.eos_token
    (ids,) = encode_texts(tokenizer, [text.format(eos=eos)])
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    opening = [1] if kind == "llama_dir" else []  # BOS, which the tokenizer itself puts first
    assert ids[: len(opening)] == opening
    assert tokenizer.decode(ids[len(opening) : -1]) == kept.format(eos=eos)


def test_eos_that_the_tokenizer_itself_adds_is_not_doubled(tmp_path: Path) -> None:
    backend = bpe(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    assert encode_texts(load_tokenizer(str(tmp_path)), ["!", "!</s>", ""]) == [[0, 2, 1], [0, 2, 1], [0, 1]]


def test_ids_are_those_of_the_words(gpt2_dir: Path) -> None:
    """Byte-level ids by hand: special tokens first, then the 256 bytes in the order of GPT-2's alphabet from `!`."""
    tokenizer = load_tokenizer(str(gpt2_dir))
    assert encode_texts(tokenizer, ["!#<|endoftext|>", '"']) == [[1, 3, 0], [2, 0]]


def test_strings_of_special_tokens_in_plain_text_are_text(chat_dir: Path) -> None:
    tokenizer = load_tokenizer(str(chat_dir))
    special = set(range(5))
    text = "<|im_start|>a<|im_end|>b<|endoftext|><spare_0><spare_1>c"
    (ids,) = encode_texts(tokenizer, [text])
    assert special.isdisjoint(ids[:-1]) and tokenizer.decode(ids[:-1]) == text


@pytest.mark.parametrize("kind", ["gpt2_dir", "llama_dir", "chat_dir"])
def test_pad_string_in_plain_text_is_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(str(request.getfixturevalue(kind)))
    pad = tokenizer.pad_token
    for ids in encode_texts(tokenizer, [f"a{pad}b", pad, f"ends {pad}"]):
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.eos_token_id == ids[-1]
    assert pad in tokenizer.decode(ids)


def test_pad_differs_from_eos(gpt2_dir: Path, llama_dir: Path, chat_dir: Path) -> None:
    """A new token where there is none to spare, else the first that neither a role nor the template uses."""
    found = [load_tokenizer(str(folder)) for folder in (gpt2_dir, llama_dir, chat_dir)]
    assert [tokenizer.pad_token for tokenizer in found] == ["<|pad|>", "<|pad|>", "<spare_0>"]
    assert [(tokenizer.pad_token_id, len(tokenizer)) for tokenizer in found] == [(320, 321), (320, 321), (3, 320)]
    assert all(tokenizer.padding_side == "right" for tokenizer in found)


@pytest.mark.parametrize(
    ("special", "named", "template", "pad"),
    [
        (["<e>", "<p>", "<s>"], {"pad_token": "<p>"}, None, "<p>"),  # its own pad stays
        (["<e>", "<s>", "<|finetune_pad|>"], {}, None, "<|finetune_pad|>"),  # a spare one called pad comes first
        (["<e>", "<|user|>", "<|tool|>", "<s>"], {}, "{% for m in messages %}<|{{ m.role }}|>{% endfor %}", "<s>"),
        (["<e>", "<in>", "<s>"], {}, "<in>{{ messages[0].content }}", "<s>"),
        (["<e>", "<m>"], {"mask_token": "<m>"}, None, "<|pad|>"),  # a mask is not spare
    ],
)
def test_pad_token_is_one_that_nothing_uses(
    special: list[str], named: dict[str, str], template: str | None, pad: str, tmp_path: Path
) -> None:
    assert load_tokenizer(save(tmp_path, special, template, eos_token="<e>", **named)).pad_token == pad


def test_loaded_tokenizer_keeps_its_length_and_warns_of_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = load_tokenizer(save(tmp_path, ["<e>"], CHATML, eos_token="<e>", model_max_length=4))
    encode_texts(tokenizer, ["longer than four tokens"])
    encode_dialogues(tokenizer, [[QUESTION, answer("longer than four tokens")]])
    assert tokenizer.model_max_length == 4 and not caplog.records


def test_padding_and_truncation_saved_with_a_tokenizer_do_not_count(tmp_path: Path) -> None:
    saved = PreTrainedTokenizerFast(tokenizer_object=bpe(["<e>", "<p>"]), eos_token="<e>", pad_token="<p>")
    saved("abc", padding="max_length", max_length=4, truncation=True)
    saved.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    state = tokenizer.backend_tokenizer.to_str()
    assert [len(ids) for ids in encode_texts(tokenizer, ["!", "!!!!!!!!"])] == [2, 9]
    assert tokenizer.backend_tokenizer.to_str() == state  # the cache of tokenised pairs goes by it


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("Because.", "Because."),
        ("Because.<|im_end|>", "Because."),
        ("Because.<|im_end|>\n", "Because."),
        ("Because.\n", "Because.\n"),
        ("Be<|im_end|>cause.", "Be<|im_end|>cause."),
    ],
)
def test_dialogue_ends_in_eos_without_the_template_s_tail(content: str, kept: str, chat_dir: Path) -> None:
    tokenizer = load_tokenizer(str(chat_dir))
    (ids,) = encode_dialogues(tokenizer, [[QUESTION, answer(content)]])
    rendered = f"<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{kept}"
    assert ids == [*raw(tokenizer, rendered), tokenizer.eos_token_id]
    assert ids[-2] != tokenizer.eos_token_id


def test_pad_string_in_a_message_is_text(chat_dir: Path) -> None:
    """The special tokens around it stay what they are: BOS of a turn (1), EOS (2); pad is 3."""
    tokenizer = load_tokenizer(str(chat_dir))
    dialogues = [[QUESTION, answer("<spare_0>a<spare_0><spare_0>")], [QUESTION, answer("plain")]]
    ids, plain = encode_dialogues(tokenizer, dialogues)
    assert tokenizer.pad_token_id == 3 and 3 not in ids
    assert [number for number in ids if number < 5] == [1, 2, 1, 2]
    assert "assistant\n<spare_0>a<spare_0><spare_0><|im_end|>" in tokenizer.decode(ids)
    assert plain == encode_dialogues(tokenizer, dialogues[1:])[0]


def test_tail_is_found_for_the_role_of_each_last_turn(tmp_path: Path) -> None:
    """A template after Llama 2's: the user's turn closes with ` [/INST]`, the assistant's with ` </s>`."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(save(tmp_path, ["<s>", "</s>"], template, bos_token="<s>", eos_token="</s>"))
    asked, answered = encode_dialogues(tokenizer, [[QUESTION], [QUESTION, answer("So.")]])
    assert asked == [*raw(tokenizer, "<s>[INST] Why?"), 1]
    assert answered == [*raw(tokenizer, "<s>[INST] Why? [/INST] So."), 1]


def test_recipe_names_eos_token_and_chat_template(chat_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}«{{ m.content }}»{% endfor %}", encoding="utf-8")
    config = RewardRecipeConfig(
        output_dir=str(tmp_path), eos_token="<|endoftext|>", chat_template_path=str(template), bf16=False
    )
    tokenizer = load_recipe_tokenizer(config, ModelConfig(model_name_or_path=str(chat_dir)))
    (ids,) = encode_dialogues(tokenizer, [[QUESTION, answer("So.")]])
    assert ids == [*raw(tokenizer, "«Why?»«So."), 0]
    assert tokenizer.pad_token == "<|im_end|>"  # differs from the new EOS, so it stays


def test_no_template_or_one_that_refuses_is_a_user_error(gpt2_dir: Path, chat_dir: Path) -> None:
    with pytest.raises(UserError, match="chat template, found none; set chat_template_path"):
        encode_dialogues(load_tokenizer(str(gpt2_dir)), [[QUESTION]])
    tokenizer = load_tokenizer(str(chat_dir))
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UserError, match=r"rejects a dialogue that ends in .*Why.*: no such role"):
        encode_dialogues(tokenizer, [[QUESTION]])


def test_what_is_no_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    nothing, broken, no_eos, no_files = (tmp_path / name for name in ("nothing", "broken", "no_eos", "no_files"))
    save(no_eos, ["<x>"])
    GPT2Config().save_pretrained(no_files)  # GPT2Tokenizer then loads with an empty vocabulary, to which all is ""
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    for name, options, message in [
        (nothing, {}, f"expected a hub id or a path that is there, found nothing at '{nothing}'; paths begin"),
        (broken, {}, f"tokenizer of {broken}: "),
        (no_files, {}, "expected a tokenizer's files .*found none"),
        (no_eos, {}, "expected a tokenizer with an EOS token, found none; set eos_token"),
        (no_eos, {"eos_token": "<y>"}, "expected a token of .*no_eos's vocabulary, found '<y>'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(name), **options)


def test_a_dialogue_has_the_same_ids_alone_and_beside_others(chat_dir: Path) -> None:
    """What the template writes after a last turn is decided from that dialogue alone, in any order."""
    tokenizer = load_tokenizer(str(chat_dir))
    # It ends a reply that asks a question in another way.
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}"
        "{% if loop.length > 2 %}<|im_end|> long{% else %}<|im_end|>{% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    dialogues = [turns, [*turns, *turns], turns[1:]]
    alone = [encode_dialogues(tokenizer, [dialogue])[0] for dialogue in dialogues]
    assert encode_dialogues(tokenizer, dialogues) == alone
    assert encode_dialogues(tokenizer, dialogues[::-1]) == alone[::-1]
