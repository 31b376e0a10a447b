"""Ids of texts and dialogues: TRL's own with EOS last, never a pad token, and no neighbour counts.

Under every chat template that TRL bundles, too; calls count, or are said not to.
"""

import logging
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import trl
from conftest import CHATML, as_pairs, bpe, trl_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import GPT2Config, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import ModelConfig

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.pairs import Dialogue, Status, encode_splits, encode_texts, load_recipe_tokenizer, load_tokenizer
from reward_recipes.pairs.tokens import render
from reward_recipes.run import UserError

Tokenizers = dict[str, PreTrainedTokenizerBase]

# Of an attacker, or of a careless export: they look like the end, like padding, like a turn.
ODD = [*"<|endoftext|> <|pad|> <spare_0> <|im_end|> <|im_start|> </s> <s> <|".split(), "<|im_end|>\n", " ", "\n"]
TEXTS = st.lists(st.sampled_from(ODD) | st.text(max_size=6), max_size=8).map("".join)

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
ONLY_PARTS = ("idefics3", "llava_next", "smolvlm")  # a plain string under these is lost, or refused
ENDS = """
    <|im_end|> <|im_start|> <|END_OF_TURN_TOKEN|> <\uff5cend\u2581of\u2581sentence\uff5c> <turn|> <end_of_turn>
    <|return|> <end_of_utterance> <|eot_id|> <|eot|>
""".split()
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}}
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "Time", "parameters": PARAMETERS}}]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reply(content: str | None, **call: str) -> dict[str, Any]:
    calls = {"tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": call}}]} if call else {}
    return {"role": "assistant", "content": content, **calls}


def save(folder: Path, special: list[str], template: str | None = None, **named: object) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(special), **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids with special tokens read as such and nothing added, as a reference."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def loaded(gpt2_dir: Path, llama_dir: Path, chat_dir: Path) -> Tokenizers:
    folders = {"gpt2": gpt2_dir, "llama": llama_dir, "chat": chat_dir}
    return {name: load_tokenizer(str(folder)) for name, folder in folders.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_any_text_is_read_as_trl_reads_it_but_for_the_pad_token(texts: list[str], loaded: Tokenizers) -> None:
    """As plain text and in a dialogue, with the same ids alone and among others."""
    for name, tokenizer in loaded.items():
        dialogues = [[user(text), reply(text)] for text in texts if name == "chat"]
        mixed = [*texts, *dialogues]
        found = encode_texts(tokenizer, mixed)
        assert found == [encode_texts(tokenizer, [text])[0] for text in mixed]
        for text, ids in zip(mixed, found, strict=True):
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.pad_token_id not in ids
            assert tokenizer.pad_token in str(text) or ids == trl_ids(tokenizer, text)
        for text, ids in zip(texts, found, strict=False):
            assert tokenizer.decode(ids[name == "llama" : -1]) == text.removesuffix(tokenizer.eos_token)  # without BOS


def test_one_eos_at_the_end_is_not_doubled(tmp_path: Path) -> None:
    """Not by a tokenizer either that adds EOS itself; the byte `!` is the first id after the special ones."""
    backend = bpe(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    assert encode_texts(load_tokenizer(str(tmp_path)), ["!", "!</s>", ""]) == [[0, 2, 1], [0, 2, 1], [0, 1]]


def test_pad_token_is_one_that_nothing_uses(loaded: Tokenizers, tmp_path: Path) -> None:
    """Its own one but EOS, else a spare special token that neither a role nor the template uses, else a new one."""
    found = [(each.pad_token, each.pad_token_id, len(each), each.padding_side) for each in loaded.values()]
    assert found == [("<|pad|>", 320, 321, "right")] * 2 + [("<spare_0>", 3, 320, "right")]
    by_role = "{% for m in messages %}<|{{ m.role }}|>{% endfor %}"
    for number, (special, named, template, pad) in enumerate(
        [
            (["<e>", "<p>", "<s>"], {"pad_token": "<p>"}, None, "<p>"),
            (["<e>", "<s>", "<|finetune_pad|>"], {}, None, "<|finetune_pad|>"),  # a spare one called pad comes first
            (["<e>", "<|user|>", "<|tool|>", "<s>"], {}, by_role, "<s>"),
            (["<e>", "<in>", "<s>"], {}, "<in>{{ messages[0].content }}", "<s>"),
            (["<e>", "<m>"], {"mask_token": "<m>"}, None, "<|pad|>"),  # a mask is not spare
        ]
    ):
        folder = save(tmp_path / str(number), special, template, eos_token="<e>", **named)
        assert load_tokenizer(folder).pad_token == pad


def test_limits_saved_with_a_tokenizer_neither_cut_nor_pad_nor_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    named = {"eos_token": "<e>", "pad_token": "<p>", "model_max_length": 4}
    saved = PreTrainedTokenizerFast(tokenizer_object=bpe(["<e>", "<p>"]), chat_template=CHATML, **named)
    saved("abc", padding="max_length", max_length=4, truncation=True)
    saved.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    state = tokenizer.backend_tokenizer.to_str()
    assert [len(ids) for ids in encode_texts(tokenizer, ["!", "!!!!!!!!"])] == [2, 9]
    encode_texts(tokenizer, [[user("Why?"), reply("longer than four tokens")]])
    assert tokenizer.model_max_length == 4 and not caplog.records
    assert tokenizer.backend_tokenizer.to_str() == state  # the cache of tokenised pairs goes by it


def test_dialogue_ends_where_its_template_writes_the_last_eos(loaded: Tokenizers) -> None:
    """White space behind it goes; nothing that a message holds does, and its pad tokens, of id 3, become text."""
    tokenizer = loaded["chat"]
    for content in ("Because.\n", "Be<|im_end|>cause.", "<spare_0>a<spare_0>"):
        (ids,) = encode_texts(tokenizer, [[user("Why?"), reply(content)]])
        rendered = f"<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{content}"
        assert tokenizer.decode(ids) == f"{rendered}<|im_end|>" and 3 not in ids


def test_eos_follows_what_a_template_ends_in_otherwise(loaded: Tokenizers) -> None:
    """Under a template that looks at the length. Neighbours do not count."""
    chat = copy(loaded["chat"])
    chat.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}"
        "{% if loop.length > 2 %}<|im_end|> long{% else %}<|im_end|>{% endif %}{% endfor %}"
    )
    turns = [user("Why?"), reply("So.")]
    long = "<|im_start|>user Why?<|im_end|> long<|im_start|>assistant So.<|im_end|> long" * 2
    short = "<|im_start|>user Why?<|im_end|><|im_start|>assistant So."
    texts = [turns, turns * 2, turns[1:]]
    ids = [[*raw(chat, text), 2] for text in (short, long, short.partition("<|im_end|>")[2])]
    assert encode_texts(chat, texts) == ids and encode_texts(chat, texts[::-1]) == ids[::-1]


def test_recipe_names_eos_token_and_chat_template(chat_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}«{{ m.content }}»{% endfor %}", encoding="utf-8")
    config = RewardRecipeConfig("unused", eos_token="<|endoftext|>", chat_template_path=str(template), bf16=False)
    tokenizer = load_recipe_tokenizer(config, ModelConfig(model_name_or_path=str(chat_dir)))
    (ids,) = encode_texts(tokenizer, [[user("Why?"), reply("So.")]])
    assert ids == [*raw(tokenizer, "«Why?»«So.»"), 0]
    assert tokenizer.pad_token == "<|im_end|>"  # differs from the new EOS, so it stays


def test_what_is_no_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    save(tmp_path / "no_eos", ["<x>"])
    GPT2Config().save_pretrained(tmp_path / "no_files")  # GPT2Tokenizer then loads, and knows no word
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    mistakes = {"nothing": "found", "broken": "tokenizer", "no_files": "files", "no_eos": "set eos_token"}
    for name, word in mistakes.items():
        with pytest.raises(UserError, match=f"{name}.*{word}|{word}.*{name}"):
            load_tokenizer(str(tmp_path / name))
    with pytest.raises(UserError, match=r"eos_token: .*no_eos.*'<y>'"):
        load_tokenizer(str(tmp_path / "no_eos"), eos_token="<y>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    return save(tmp_path_factory.mktemp("tokenizer"), [*ENDS, "<pad>"], **named)


@pytest.fixture(params=TEMPLATES)
def tokenizer(request: pytest.FixtureRequest, folder: str) -> PreTrainedTokenizerBase:
    """With the template, and as EOS what that writes last, where it is one of a model's."""
    found = load_tokenizer(folder, chat_template=TEMPLATES[request.param])
    found.name_or_path = request.param
    written = render(found, parts_where_needed(found, [user("Time?"), reply("Nine.")])).rstrip()
    found.eos_token = next((end for end in ENDS if written.endswith(end)), found.eos_token)
    return found


def parts_where_needed(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not tokenizer.name_or_path.startswith(ONLY_PARTS):
        return turns
    return [turn | {"content": [{"type": "text", "text": turn["content"] or ""}]} for turn in turns]


def test_ids_are_trl_s_and_those_of_the_dialogue_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template that refuses one refuses it under both."""
    turns = [user("Time?"), reply("Nine. "), user("Sure?"), reply("Yes.\n")]
    result = {"role": "tool", "name": "clock", "content": "9"}
    found = [Dialogue(parts_where_needed(tokenizer, turns[:size])) for size in (2, 3, 4)]
    found += [Dialogue(turns[2:], TOOLS), Dialogue([user("Time?"), reply(None, city="Oslo")], TOOLS)]
    found += [Dialogue([user("Time?"), reply("Look.", city="Oslo"), result, reply("Nine.")])]
    dialogues, expected = [], []
    for dialogue in found:
        try:
            expected.append(trl_ids(tokenizer, dialogue))
            dialogues.append(dialogue)
        except Exception:
            with pytest.raises(UserError, match="the chat template rejects"):
                encode_texts(tokenizer, [dialogue])
    assert len(expected) >= 3
    assert [encode_texts(tokenizer, [dialogue])[0] for dialogue in dialogues] == expected
    assert encode_texts(tokenizer, dialogues) == expected
    assert encode_texts(tokenizer, dialogues[::-1]) == expected[::-1]
    dated = tokenizer.chat_template.startswith("{%- macro strftime_now(")  # one text has one score on any day
    assert dated or "strftime_now(" not in tokenizer.chat_template


def test_a_call_tells_a_pair_apart_or_what_is_left_out_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = [user("Time?")]
    sides = [parts_where_needed(tokenizer, [*prompt, reply("Look.", city=city)]) for city in ("Oslo", "Rome")]
    if tokenizer.name_or_path == "deepseekv3":  # which takes arguments only as text
        for turns in sides:
            turns[-1]["tool_calls"][0]["function"]["arguments"] = str(turns[-1]["tool_calls"])
    calls = {"chosen": sides[0], "rejected": sides[1], "tools": None}
    offered = {"chosen": [*prompt, reply("Nine.")], "rejected": [*prompt, reply("Ten.")]}
    offered = {side: parts_where_needed(tokenizer, turns) for side, turns in offered.items()} | {"tools": TOOLS}
    encoded = encode_splits({"": as_pairs([calls, offered])}, tokenizer, 9999, "drop", [])[""]
    written = "Oslo" in render(tokenizer, sides[0])
    assert encoded["status"][:] == [Status.KEPT if written else Status.IDENTICAL, Status.KEPT]
    knows_tools = "clock" in render(tokenizer, Dialogue(offered["chosen"], TOOLS))
    assert encoded["left_out"][:] == [not written, not knows_tools]
    known = {"qwen3": True, "llama3_1": True, "gemma": False, "llama3": False}  # both kinds stand among them
    assert known.get(tokenizer.name_or_path, written) == written
