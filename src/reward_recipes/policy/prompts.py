"""Which prompts a policy is asked: taken from the same data sets that reward models are trained on."""

from typing import Any

import numpy as np
import pandas as pd
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.pairs import HH_REPLY, column_kind, encode_rendered, join, load_pairs, render, split_of
from reward_recipes.run import UserError


def load_prompts(
    script: ScriptArguments, data_dirs: list[str] | None, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> Dataset:
    """Load the training split's distinct prompts of at most `max_prompt_length` tokens.

    A prompt is the column `prompt`, or what comes before the last reply in `chosen`: up to `\\n\\nAssistant:` in
    dialogues of HH-RLHF's form, all messages but the last in conversational data. `data_dirs` are folders inside the
    data set that `script` names.

    Returns:
        Columns `prompt` (text or messages) and `input_ids`.

    Raises:
        UserError: data that cannot be read, or without prompts that fit.
    """
    name, split_name = script.dataset_name, script.dataset_train_split
    with PartialState().local_main_process_first():
        split = split_of(load_pairs(name, script.dataset_config, data_dirs), split_name, name, "dataset_train_split")
        columns = [column for column in ("prompt", "chosen") if column in split.column_names]
        if not columns:
            raise UserError(f"{name}: expected a column 'prompt' or 'chosen', found {sorted(split.column_names)}")
        column_kind(split, columns[0], f"{name}, split {split_name}")
        options = {"fn_kwargs": {"tokenizer": tokenizer}, "remove_columns": columns, "desc": "Taking prompts"}
        prompts = split.select_columns(columns).map(_take_prompts, batched=True, **options)
    taken = prompts[:] if len(prompts) else {"prompt": [], "input_ids": []}  # no row left, no column either
    distinct = ~pd.Series([str(prompt) for prompt in taken["prompt"]]).duplicated()
    fits = pd.Series([len(ids) for ids in taken["input_ids"]]).between(1, max_prompt_length)
    kept, found = np.flatnonzero(distinct & fits), int(distinct.sum())
    if not len(kept):
        raise UserError(
            f"{name}: expected prompts in {columns} of at most {max_prompt_length} tokens (max_prompt_length), found "
            f"{found} of which none fits; add a column 'prompt', or give dialogues as messages or in HH-RLHF's form"
        )
    PartialState().print(f"{len(kept):,} prompts; {found - len(kept):,} left out as empty or too long")
    return prompts.select(kept)


def _take_prompts(batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The prompts of a batch and their token ids; rows without a prompt are left out."""
    rows = len(next(iter(batch.values())))
    columns = (batch.get(name, [None] * rows) for name in ("prompt", "chosen"))
    prompts = [prompt for prompt in map(_prompt, *columns) if prompt]
    return {"prompt": prompts, "input_ids": [_encode(prompt, tokenizer) for prompt in prompts]}


def _prompt(prompt: Any, chosen: Any) -> Any:
    """What is asked in a row, as training joins it: text beside messages is a user's turn."""
    if isinstance(chosen, list) and chosen:
        return join(prompt, chosen)[:-1] if prompt else chosen[:-1]
    return prompt or "".join((chosen or "").rpartition(HH_REPLY)[:2])


def _encode(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt, split_special_tokens=True)["input_ids"]
    return encode_rendered(tokenizer, render(tokenizer, prompt, add_generation_prompt=True))
