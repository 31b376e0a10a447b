"""What a prompt and a reply are together: one text, or one list of messages. Every command joins them here."""

import re
from ast import literal_eval
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from reward_recipes.pairs.files import parse_json, parse_value
from reward_recipes.run import UserError

HH_REPLY = "\n\nAssistant:"
# What stands before the first reply in whole texts.
MARKERS = (
    *(HH_REPLY, "[/INST]", "### Response:", "<|im_start|>assistant", "<|start_header_id|>assistant"),
    *("<start_of_turn>model", "<|assistant|>"),
)
# Behind a prompt that is a turn of a whole text: signs that end its turn, then the reply's.
REPLIED = re.compile(r" ?(?:<[^<>]{1,30}> ?)*?(?:" + "|".join(re.escape(sign.strip()) for sign in MARKERS) + ")")
SPACE = re.compile(r"\s*")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Dialogue:
    """Messages, and what the chat template gets beside them."""

    messages: Messages  # with `role` and `content`, and whatever else a template reads
    tools: list[Any] | None = None
    options: dict[str, Any] | None = None  # further variables of the template, a row's `chat_template_kwargs`


Text = str | Messages | Dialogue
TEMPLATE_VALUES = {"tools": list, "chat_template_kwargs": dict}


def with_template_values(text: str | Messages, row: Mapping[str, Any]) -> str | Dialogue:
    """A text as it is, or a dialogue with its row's `tools` and `chat_template_kwargs`; raises as `parse_value`."""
    if isinstance(text, str):
        return text
    given = {name: row[name] for name in TEMPLATE_VALUES if row.get(name) not in (None, "")}
    found = {name: parse_value(value, TEMPLATE_VALUES[name], name) for name, value in given.items()}
    return Dialogue(text, found.get("tools"), found.get("chat_template_kwargs"))


def as_messages(value: Any) -> Messages | None:
    """A value as messages, which may be JSON, or a list of Python, in text; None if it is no list of them.

    Raises:
        ValueError: a list that holds something else.
    """
    if isinstance(value, str):
        if not re.match(r"\s*\[\s*\{", value):
            return None
        for parse in (parse_json, literal_eval):  # as json writes it, and as Python prints it
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                return as_messages(parse(value))
        return None
    if not isinstance(value, list):
        return None
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not message.keys() & {"content", "tool_calls"}
            or not isinstance(content, (str, list, type(None)))
        ):
            raise ValueError(f"expected messages with `role` and `content`, found {message!r:.60}")
    return value


def join(prompt: str | Messages | None, replies: Sequence[str | Messages]) -> list[str | Messages]:
    """A prompt with each reply to it, as text, or as messages if prompt or reply is.

    A reply that already contains the prompt stays as it is; white space at the seam is ignored. For a prompt of one or
    two words, all replies must contain it, because a reply to "Hi" may begin with it. A prompt that is text becomes the
    user's turn, and a reply the assistant's.

    Raises:
        UserError: a dialogue that opens with another turn of the user, so that nobody knows where the prompt belongs.
    """
    if not prompt:
        return list(replies)
    if isinstance(prompt, str) and all(isinstance(reply, str) for reply in replies):
        if all(_has_turn(reply, prompt) for reply in replies):
            return list(replies)
        holds = [_end_of(prompt, reply) > 0 for reply in replies]
        sure = all(holds) or len(prompt.split()) > 2
        return [reply if sure and held else prompt + reply for reply, held in zip(replies, holds, strict=True)]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [_joined(asked, reply) for reply in replies]


def _joined(asked: Messages, reply: str | Messages) -> Messages:
    replied = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
    if _holds(replied, asked):
        lacks = asked[0]["role"] == "system" != replied[0]["role"]
        return [asked[0], *replied] if lacks else replied
    if replied and (replied[0]["role"] == "system" or replied[0]["role"] == asked[-1]["role"] == "user"):
        raise UserError(
            f"expected a dialogue that holds its prompt, or replies to it, found the prompt {_shown(asked)} and a "
            f"dialogue from {_shown(replied)}; remove the column 'prompt', or keep only replies in the sides"
        )
    return [*asked, *replied]


def _shown(messages: Messages) -> str:
    return f"{messages[0]['role']}: {text_of(messages[0])!r:.40}"


def spaced(text: str) -> str:
    """A text's words, between which white space does not tell prompts apart."""
    return " ".join(text.split())


def _end_of(prompt: str, text: str) -> int:
    """Where the prompt ends that a text begins with, whatever the white space; 0 if there is none, or its word goes on.

    No pattern is made of the prompt: to compile one takes longer than to tokenise the pair.
    """
    end = 0
    for word in prompt.split():
        end = SPACE.match(text, end).end()
        if not text.startswith(word, end):
            return 0
        end += len(word)
    seam = text[end - 1 : end + 1] if end else ""
    return 0 if len(seam) == 2 and seam.isalnum() else end


def _has_turn(text: str, prompt: str) -> bool:
    """Whether the prompt is a turn of a whole text, which a reply follows."""
    turn = spaced(prompt)
    return bool(turn) and any(REPLIED.match(rest) for rest in spaced(text).split(turn)[1:])


def _holds(messages: Messages, asked: Messages) -> bool:
    wanted = [(turn["role"], _compared(turn)) for turn in asked if turn["role"] != "system"]
    found = [(turn["role"], _compared(turn)) for turn in messages]
    return bool(wanted) and any(found[i : i + len(wanted)] == wanted for i in range(len(found)))


def _compared(turn: dict[str, Any]) -> Any:
    return text_of(turn).split() or turn.get("tool_calls")


def text_of(turn: dict[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = turn.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if isinstance(part, dict))


def is_blank(side: str | Messages | None) -> bool:
    """Whether a side says nothing: no text, and no call in its last turn."""
    if not isinstance(side, list) or not side:
        return not side or side.isspace()
    content = side[-1].get("content")
    other_part = isinstance(content, list) and any(part.get("type") != "text" for part in content)  # an image, say
    return not (_compared(side[-1]) or other_part)


def last_reply(prompt: str | Messages | None, whole: str | Messages) -> str:
    """The text of the last reply in what `join` gives, without white space around it.

    Of messages it is the last one's; of text what follows the prompt, or in HH's format the last "Assistant:"; without
    either all of it.
    """
    if isinstance(whole, list):
        return text_of(whole[-1]).strip()
    if isinstance(prompt, str) and prompt:
        end = len(prompt) if whole.startswith(prompt) else _end_of(prompt, whole)
        return whole[end:].strip()
    return whole.rpartition(HH_REPLY)[2].strip()
