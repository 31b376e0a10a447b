"""Which token ids a text or a dialogue becomes: EOS once and last, never a pad token."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, RewardConfig

from reward_recipes.run import UserError, check_source

NEW_PAD_TOKEN = "<|pad|>"
Messages = list[dict[str, str]]


def load_recipe_tokenizer(config: RewardConfig, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe names, with its `eos_token` and `chat_template_path`; raises as `load_tokenizer`.

    It is the first that may bring code of its own, so that `trust_remote_code` is said aloud here.
    """
    if config.trust_remote_code:
        PartialState().print(f"trust_remote_code: code that comes with {model.model_name_or_path} runs on this machine")
    return load_tokenizer(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=config.trust_remote_code,
        eos_token=config.eos_token,
        chat_template=_template(config.chat_template_path) if config.chat_template_path else None,
    )


def _template(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template_path: expected a Jinja file in UTF-8, found {path}: {error}") from error


def load_tokenizer(
    name_or_path: str,
    revision: str = "main",
    trust_remote_code: bool = False,
    eos_token: str | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer whose pad token differs from its EOS token.

    `*ForSequenceClassification` reads the score at the last token that is not padding. With pad equal to EOS that is
    the token before EOS, while PPO reads at EOS. So a pad token that is missing or equals EOS is replaced: by a spare
    special token of the tokenizer, else by a new one (the model's embedding must then grow, see `modeling`).

    Args:
        name_or_path: hub id or folder.
        revision: of the hub repository.
        trust_remote_code: whether to run a tokenizer's own code.
        eos_token: token to use as EOS instead of the tokenizer's own.
        chat_template: Jinja text to use instead of the tokenizer's own.

    Raises:
        UserError: nothing there, files that are broken or missing, or no EOS token.
    """
    check_source("model", name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file makes the tokenizer classes raise almost anything
        raise UserError(f"tokenizer of {name_or_path}: {error}{_hub_hint(name_or_path)}") from error
    # Some classes load without a file, and know no word.
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"{name_or_path}: expected a tokenizer's files (tokenizer.json, say), found none; copy them there"
        )
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token: expected a token of {name_or_path}'s vocabulary, found {eos_token!r}")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name_or_path}: expected a tokenizer with an EOS token, found none; set eos_token")
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": _spare_special_token(tokenizer) or NEW_PAD_TOKEN})
    tokenizer.padding_side = "right"
    return tokenizer


def _hub_hint(name_or_path: str) -> str:
    return "" if Path(name_or_path).exists() else "; without hub access, point at a local folder instead"


def _spare_special_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that nothing uses: neither a named role nor the chat template. One called pad comes first."""
    named = set(tokenizer.special_tokens_map.values())
    template = _all_that_it_writes(tokenizer) if tokenizer.chat_template else ""
    spare = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in named and token.content not in template
    ]
    return min(spare, key=lambda token: "pad" not in token.lower(), default=None)


def _all_that_it_writes(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template and its output for the usual roles, whose tokens it may put together (`'<|' + role + '|>'`)."""
    written = [str(tokenizer.chat_template)]
    for roles in (["user", "assistant"], ["system", "user"], ["user", "assistant", "tool"]):
        with suppress(UserError):
            written.append(render(tokenizer, [{"role": role, "content": "text"} for role in roles]))
    return "".join(written)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, each ending in one EOS id.

    A literal EOS at a text's end is not doubled. Special-token strings elsewhere are ordinary text, so that data can
    neither end a sequence early nor hold a pad token.
    """
    stripped = [_without_final(tokenizer.eos_token, text) for text in texts]
    batch = tokenizer(stripped, split_special_tokens=True, return_attention_mask=False, verbose=False)
    return [_end_with_eos(tokenizer, ids) for ids in batch["input_ids"]]


def encode_dialogues(tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Messages]) -> list[list[int]]:
    """Token ids of dialogues through the tokenizer's chat template, each ending in one EOS id.

    What the template writes after the last turn (`<|im_end|>` and a newline, say) is replaced by EOS, so that the
    score is read at the same token for every model. The pad token's string inside a message stays ordinary text.

    Raises:
        UserError: no chat template, or one that rejects a dialogue.
    """
    rendered = []
    for dialogue in dialogues:
        text = render(tokenizer, dialogue).removesuffix(_template_tail(tokenizer, dialogue))
        rendered.append(_without_final(tokenizer.eos_token, text))
    batch = tokenizer(rendered, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    pad = tokenizer.pad_token
    return [
        _end_with_eos(tokenizer, encode_rendered(tokenizer, text) if pad in text else ids)
        for text, ids in zip(rendered, batch, strict=True)
    ]


def _without_final(eos: str, text: str) -> str:
    """A text without EOS at its end, be it one or several, with or without white space after them."""
    # Read backwards, so that a megabyte of them takes linear time.
    final = re.match(rf"(?:\s*{re.escape(eos[::-1])})+", text[::-1])
    return text[: len(text) - final.end()] if final else text


def _end_with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return [*ids[:end], eos]


def render(tokenizer: PreTrainedTokenizerBase, dialogue: Messages, add_generation_prompt: bool = False) -> str:
    """A dialogue as its chat template writes it, with the opening of a reply if asked.

    Raises:
        UserError: no chat template, or one that rejects the dialogue.
    """
    if not tokenizer.chat_template:
        raise UserError("conversational data need a chat template, found none; set chat_template_path to a Jinja file")
    try:
        return tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # Jinja templates raise whatever they like
        raise UserError(f"the chat template rejects a dialogue that ends in {dialogue[-1]!r:.80}: {error}") from error


def _template_tail(tokenizer: PreTrainedTokenizerBase, dialogue: Messages) -> str:
    """What the template writes after the text of a last turn like this dialogue's."""
    mark = "text of the last turn"
    return render(tokenizer, [*dialogue[:-1], {**dialogue[-1], "content": mark}]).rpartition(mark)[2]


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Token ids of what `render` gives.

    A pad token in the data would move the position where the score is read, so its string is encoded as text; not so
    for a tokenizer that pads with EOS, which the template itself may write.
    """
    if tokenizer.pad_token == tokenizer.eos_token:
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]
    pad_as_text = tokenizer(tokenizer.pad_token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    pieces = tokenizer(rendered.split(tokenizer.pad_token), add_special_tokens=False, return_attention_mask=False)
    first, *others = pieces["input_ids"]
    return [*first, *(token for piece in others for token in (*pad_as_text, *piece))]
