"""Which token ids a text or a dialogue becomes: EOS last, never a pad token."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, RewardConfig

from reward_recipes.pairs.dialogue import Dialogue, Messages, Text
from reward_recipes.run import UserError, check_source, first_line, source_hint

NEW_PAD_TOKEN = "<|pad|>"
DATE = datetime(2026, 1, 1)  # for chat templates that ask for today's: one text has one score on any day
# Stands in front of a dated template and hides the clock from it, whatever it asks with; it is saved with the model.
DATED = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f".replace('%{code}', '{DATE.strftime('%' + code)}')" for code in "aAbBcdDeFHIjmMpSTuUVwWxXyYZ")
    + ".replace('%-d', '1').replace('%-m', '1') }}{%- endmacro %}\n"
)
# Stand around a saved template, so that what it writes for a whole dialogue ends exactly at EOS.
OPENING = "{% set written +%}"
CLOSING = (
    "{%+ endset %}{{ written if add_generation_prompt else "
    "(written.rstrip() if written.rstrip().endswith(eos_token) else written + eos_token) }}"
)


class Written(NamedTuple):
    """A string to tokenise, and whether it is plain text rather than what a chat template wrote."""

    string: str
    is_plain: bool


def load_recipe_tokenizer(config: RewardConfig, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe names, with its `eos_token` and `chat_template_path`; raises as `load_tokenizer`.

    It is the first that may bring code of its own, so that `trust_remote_code` is said aloud here.
    """
    if config.trust_remote_code:
        PartialState().print(f"trust_remote_code: code that comes with {model.model_name_or_path} runs on this machine")
    path = config.chat_template_path
    try:
        template = Path(path).read_text("utf-8") if path else None
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template_path: expected a Jinja file in UTF-8, found {path}: {error}") from error
    return load_tokenizer(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=config.trust_remote_code,
        eos_token=config.eos_token,
        chat_template=template,
    )


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
    special token of the tokenizer, else by a new one, for which the embedding grows in `score.model.fit_to_tokenizer`.

    Args:
        name_or_path: hub id or folder.
        trust_remote_code: whether to run a tokenizer's own code.
        eos_token: token to use as EOS instead of the tokenizer's own.
        chat_template: Jinja text to use instead of the tokenizer's own.

    Raises:
        UserError: nothing there, files that are broken or missing, or no EOS token.
    """
    tokenizer = _read_tokenizer(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(f"eos_token: expected a token of {name_or_path}'s vocabulary, found {eos_token!r}")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name_or_path}: expected a tokenizer with an EOS token, found none; set eos_token")
    tokenizer.chat_template = _each(chat_template or tokenizer.chat_template, _with_fixed_date)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend and backend.normalizer and backend.normalizer.normalize_str(f"a{tokenizer.eos_token}") == "a":
        backend.normalizer = None  # of `save_tokenizer`; here `write` takes EOS away, and only once
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": _spare_special_token(tokenizer) or NEW_PAD_TOKEN})
    tokenizer.padding_side = "right"
    return tokenizer


def _read_tokenizer(name_or_path: str, **options: Any) -> PreTrainedTokenizerBase:
    check_source("model", name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    except Exception as error:  # a broken file makes the tokenizer classes raise almost anything
        hint = source_hint(error, name_or_path, "model_name_or_path")
        raise UserError(f"tokenizer of {name_or_path}: {error}{hint}") from error
    # Some classes load without a file, and know no word.
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"{name_or_path}: expected a tokenizer's files (tokenizer.json, say), found none; copy them there"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path, max_length: int) -> None:
    """Save a tokenizer so that whoever loads it gets the token ids of training without adding anything.

    A text gets EOS from the post-processor, a dialogue from its template. An EOS that a text ends in is taken away
    first, where the tokenizer has neither a chat template, which writes EOS itself, nor a normalizer of its own.
    Truncation to `max_length` cuts the beginning.
    """
    saved, folder = copy(tokenizer), Path(folder)
    names = ["input_ids", "attention_mask"]  # token_type_ids would be added to GPT-2's embeddings
    fields = {"model_max_length": max_length, "truncation_side": "left", "model_input_names": names}
    vars(saved).update(fields, init_kwargs=tokenizer.init_kwargs | fields)
    saved.chat_template = _each(tokenizer.chat_template, _with_eos)
    saved.save_pretrained(folder)
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():  # a tokenizer in Python, which has no post-processor
        return
    backend, ids = Tokenizer.from_file(str(file)), [*_lead(tokenizer), tokenizer.eos_token_id]
    *opening, eos = tokenizer.convert_ids_to_tokens(ids)
    texts = {"single": [*opening, "$A", eos], "pair": [*opening, "$A", "$B", eos]}
    tokens = dict(zip([*opening, eos], ids, strict=True))
    backend.post_processor = processors.TemplateProcessing(**texts, special_tokens=[*tokens.items()])
    state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    if not (tokenizer.chat_template or state["normalizer"]):
        end = rf"(?<=[\s\S]){re.escape(eos)}\z"
        state["normalizer"] = {"type": "Replace", "pattern": {"Regex": end}, "content": ""}
        for token in state["added_tokens"]:  # a normalizer sees those alone that are looked for after it
            token["normalized"] |= token["special"]
    file.write_text(json.dumps(state, ensure_ascii=False), "utf-8")  # an indent would take a second
    known = json.loads(settings.read_text("utf-8"))
    # The class that takes tokenizer.json as it is, and the key for further special tokens, in transformers 4 and 5.
    known["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(known.get("extra_special_tokens"), list):
        known["additional_special_tokens"] = known.pop("extra_special_tokens")
    settings.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _each(templates: str | dict[str, str] | None, change: Callable[[str], str]) -> str | dict[str, str] | None:
    """A chat template changed, or each of several by name; None without one."""
    if isinstance(templates, dict):
        return {name: change(text) for name, text in templates.items()}
    return templates and change(templates)


def _with_eos(template: str) -> str:
    date = DATED if template.startswith(DATED) else ""
    whole = template.removeprefix(date).removesuffix("\n")  # Jinja drops the last line end of a template
    return template if whole.endswith(CLOSING) else date + OPENING + whole + CLOSING


def _with_fixed_date(template: str) -> str:
    return DATED + template if "strftime_now" in template and not template.startswith(DATED) else template


def _spare_special_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that nothing uses: neither a named role nor the chat template. One called pad comes first."""
    named, written = set(tokenizer.special_tokens_map.values()), str(tokenizer.chat_template or "")
    for roles in (["user", "assistant"], ["system", "user"], ["user", "assistant", "tool"]):
        with suppress(UserError):  # a template may put tokens together: '<|' + role + '|>'
            written += render(tokenizer, [{"role": role, "content": "text"} for role in roles])
    known = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    spare = [token for token in known if token not in named and token not in written]
    return min(spare, key=lambda token: "pad" not in token.lower(), default=None)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], as_is: bool = False) -> list[list[int]]:
    """Token ids of texts and dialogues, each decided from itself alone, ending in EOS.

    Plain text gets the tokenizer's own leading tokens (such as BOS), as in TRL; EOS follows unless the text ends in it.
    A dialogue is what its chat template writes; where that ends in EOS, white space behind it goes. Special tokens
    inside are read as such, but for the pad token: its string becomes ordinary text, because a score is read at the
    last token that is not padding. With `as_is` they are what plain transformers makes of them: no EOS is added, no
    white space goes, pad tokens stay.

    Raises:
        UserError: a dialogue without a chat template, or one that the template rejects.
    """
    return encode_written(tokenizer, [write(tokenizer, text, as_is) for text in texts], as_is)


def write(tokenizer: PreTrainedTokenizerBase, text: Text, as_is: bool = False) -> Written:
    """A text, or a dialogue as its template writes it, without a final EOS unless `as_is`; raises as `encode_texts`."""
    if isinstance(text, str):
        return Written(text if as_is else text.removesuffix(tokenizer.eos_token), is_plain=True)
    rendered = render(tokenizer, text)
    if as_is:
        return Written(rendered, is_plain=False)
    bare = rendered.rstrip()
    return Written(bare.removesuffix(tokenizer.eos_token) if bare.endswith(tokenizer.eos_token) else rendered, False)


def encode_written(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Written], as_is: bool = False
) -> list[list[int]]:
    """Token ids of what `write` gives, with EOS at the end unless `as_is`."""
    if as_is:
        return [tokenizer(string, add_special_tokens=plain, verbose=False)["input_ids"] for string, plain in texts]
    lead, eos = _lead(tokenizer), tokenizer.eos_token_id
    ids = encode_strings(tokenizer, [text.string for text in texts])
    for found in ids:
        found.append(eos)
    return [lead + found if lead and text.is_plain else found for text, found in zip(texts, ids, strict=True)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Token ids of what a policy is asked, with the opening of its reply, as `encode_texts` would begin them."""
    if isinstance(prompt, str):
        return [*_lead(tokenizer), *encode_strings(tokenizer, [prompt])[0]]
    return encode_strings(tokenizer, [render(tokenizer, prompt, add_generation_prompt=True)])[0]


@lru_cache(maxsize=8)  # to find out takes two calls, and texts may come one at a time
def _lead(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer puts before a text, BOS say."""
    (bare,), whole = encode_strings(tokenizer, ["a"]), tokenizer("a")["input_ids"]
    return whole[: whole.index(bare[0])] if bare[0] in whole else []


def render(tokenizer: PreTrainedTokenizerBase, dialogue: Messages | Dialogue, **options: Any) -> str:
    """A dialogue as its chat template writes it; raises `UserError` for no template, or one that rejects it."""
    if not tokenizer.chat_template:
        raise UserError("conversational data need a chat template, found none; set chat_template_path to a Jinja file")
    if not isinstance(dialogue, Dialogue):
        dialogue = Dialogue(dialogue)
    options |= {"tools": dialogue.tools, **(dialogue.options or {}), "tokenize": False}
    try:
        return tokenizer.apply_chat_template(dialogue.messages, **options)
    except Exception as error:  # Jinja templates raise whatever they like
        end = dialogue.messages[-1:]
        raise UserError(
            f"the chat template rejects a dialogue that ends in {end!r:.80}: {first_line(error)}; mend or remove that, "
            "or use another chat template"
        ) from error


def leaves_calls_out(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> bool:
    """Whether the chat template writes nothing of the tools that a dialogue names, or of the calls that it holds."""
    silent = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in dialogue.messages]
    variants = [replace(dialogue, tools=None)] if dialogue.tools else []
    variants += [replace(dialogue, messages=silent)] if silent != dialogue.messages else []
    with suppress(UserError):  # which a template may need them for
        return any(render(tokenizer, variant) == render(tokenizer, dialogue) for variant in variants)
    return False


def as_turns(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> str | Messages:
    """A prompt of text as the user's turn, for a model trained on messages, unless a template wrote it already."""
    if not prompt or not isinstance(prompt, str):
        return prompt
    if any(token in prompt.removesuffix(tokenizer.eos_token) for token in tokenizer.all_special_tokens):
        return prompt
    return [{"role": "user", "content": prompt}]


def encode_strings(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> list[list[int]]:
    """Token ids of strings as they stand; special tokens in them are read as such, but for the pad token.

    If pad equals EOS, the string is still read as a special token, because templates write EOS.
    """
    pad = tokenizer.pad_token
    if pad == tokenizer.eos_token or not any(pad in string for string in strings):
        return _ids(tokenizer, strings)
    as_text = tokenizer(pad, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    found = []
    for string in strings:
        first, *others = _ids(tokenizer, string.split(pad))
        found.append([*first, *(token for piece in others for token in (*as_text, *piece))])
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> list[list[int]]:
    """What calling the tokenizer gives, without the characters' offsets, which take it a quarter of its time."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not backend:  # a tokenizer in Python
        return [tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"] for string in strings]
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(strings, add_special_tokens=False)]
