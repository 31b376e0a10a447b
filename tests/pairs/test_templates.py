"""Every chat template that TRL bundles is read as TRL reads it, dialogue by dialogue; calls count, or are said not to.

A template that takes content only in parts (of images, say) is given text in parts.
"""

from pathlib import Path
from typing import Any

import pytest
import trl
from conftest import as_pairs, bpe, trl_ids
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from reward_recipes.pairs import Dialogue, Status, encode_splits, encode_texts, load_tokenizer
from reward_recipes.pairs.audit import audit_split
from reward_recipes.pairs.tokens import render
from reward_recipes.run import UserError

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
ONLY_PARTS = ("idefics3", "llava_next", "smolvlm")  # a plain string under these is lost, or refused
ENDS = """
    <|im_end|> <|im_start|> <|END_OF_TURN_TOKEN|> <\uff5cend\u2581of\u2581sentence\uff5c> <turn|> <end_of_turn>
    <|return|> <end_of_utterance> <|eot_id|> <|eot|>
""".split()
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "Time",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}},
        },
    }
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def reply(content: str | None, **call: str) -> dict[str, Any]:
    calls = {"tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": call}}]} if call else {}
    return {"role": "assistant", "content": content, **calls}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe([*ENDS, "<pad>"]), pad_token="<pad>", **named).save_pretrained(path)
    return str(path)


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


def test_a_call_tells_a_pair_apart_or_what_is_left_out_is_counted(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
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
    assert audit_split(encoded).get("left_out", 0) == (not written) + (not knows_tools)


def test_both_kinds_of_template_stand_among_them(folder: str) -> None:
    def writes(template: str) -> bool:
        sides = [[user("Time?"), reply("Look.", city=city)] for city in ("Oslo", "Rome")]
        first, second = encode_texts(load_tokenizer(folder, chat_template=template), sides)
        return first != second

    assert [writes(TEMPLATES[name]) for name in ("qwen3", "llama3_1", "gemma", "llama3")] == [True, True, False, False]
