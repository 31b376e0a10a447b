"""Which prompts a policy is asked: taken from the same data sets that reward models are trained on."""

from typing import Any

import numpy as np
import pandas as pd
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.pairs import HH_REPLY, encode_prompt, join, load_pairs, split_of
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
        source = load_pairs(name, script.dataset_config, data_dirs)
        split = split_of(source, split_name, name, "dataset_train_split")
        columns = [column for column in ("prompt", "chosen") if column in split.rows.column_names]
        if not columns:
            found = sorted((*split.rows.column_names, *split.unread))
            raise UserError(f"{name}: expected a column 'prompt' or 'chosen', found {found}; name one by --columns")
        texts = [_prompt(row.get("prompt"), row.get("chosen")) for row in map(split.row_at, range(len(split.rows)))]
        asked = [text for text in texts if text]
        prompts = Dataset.from_dict({"prompt": asked, "input_ids": [encode_prompt(tokenizer, text) for text in asked]})
    if not len(prompts):
        raise UserError(
            f"{name}: expected prompts, found none in {columns}; add a column 'prompt', or give dialogues as messages "
            "or in HH-RLHF's form"
        )
    return prompts.select(_rows_to_keep(prompts, max_prompt_length, name))


def _rows_to_keep(prompts: Dataset, max_prompt_length: int, name: str) -> np.ndarray:
    """Row numbers of each prompt's first occurrence, if it has 1 to `max_prompt_length` tokens."""
    distinct = ~pd.Series([str(prompt) for prompt in prompts["prompt"]]).duplicated()
    fits = pd.Series([len(ids) for ids in prompts["input_ids"]]).between(1, max_prompt_length)
    kept, found = np.flatnonzero(distinct & fits), int(distinct.sum())
    if not len(kept):
        raise UserError(
            f"{name}: expected prompts of at most {max_prompt_length} tokens (max_prompt_length), found {found} of "
            "which none fits"
        )
    PartialState().print(f"{len(kept):,} prompts; {found - len(kept):,} left out as empty or too long")
    return kept


def _prompt(prompt: Any, chosen: Any) -> Any:
    """What is asked in a row, as training joins it: text beside messages is a user's turn."""
    if isinstance(chosen, list) and chosen:
        return join(prompt, chosen)[:-1] if prompt else chosen[:-1]
    return prompt or "".join((chosen or "").rpartition(HH_REPLY)[:2])
