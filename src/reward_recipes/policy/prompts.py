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
    script: ScriptArguments,
    data_dirs: list[str] | None,
    columns: dict[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    sample_split: str | None = None,
) -> Dataset:
    """Load the distinct prompts of at most `max_prompt_length` tokens of the training split, or of `sample_split`.

    A prompt is the column `prompt`, or what comes before the last reply in `chosen`: up to `\\n\\nAssistant:` in
    dialogues of HH-RLHF's form, all messages but the last in conversational data. `data_dirs` are folders inside the
    data set that `script` names, `columns` its names of columns by ours.

    Returns:
        Columns `prompt` (text or messages) and `input_ids`.

    Raises:
        UserError: data that cannot be read, or without prompts that fit.
    """
    name, split_name = script.dataset_name, sample_split or script.dataset_train_split
    said_by = "sample_split" if sample_split else "dataset_train_split"
    with PartialState().local_main_process_first():
        split = split_of(load_pairs(name, script.dataset_config, data_dirs, columns), split_name, name, said_by)
        known = [column for column in ("prompt", "chosen") if column in split.rows.column_names]
        if not known:
            found = sorted((*split.rows.column_names, *split.unread))
            raise UserError(f"{name}: expected a column 'prompt' or 'chosen', found {found}; name one by --columns")
        asked = [_prompt(row.get("prompt"), row.get("chosen")) for row in map(split.row_at, range(len(split.rows)))]
        asked = [prompt for prompt in asked if prompt]
        prompts = Dataset.from_dict({"prompt": asked, "input_ids": [encode_prompt(tokenizer, text) for text in asked]})
    distinct = ~pd.Series([str(prompt) for prompt in asked]).duplicated()
    fits = pd.Series([len(ids) for ids in prompts["input_ids"]]).between(1, max_prompt_length)
    kept, found = np.flatnonzero(distinct & fits), int(distinct.sum())
    if not len(kept):
        raise UserError(
            f"{name}: expected prompts in {known} of at most {max_prompt_length} tokens (max_prompt_length), found "
            f"{found} of which none fits; add a column 'prompt', or give dialogues as messages or in HH-RLHF's form"
        )
    PartialState().print(f"{len(kept):,} prompts; {found - len(kept):,} left out as empty or too long")
    return prompts.select(kept)


def _prompt(prompt: Any, chosen: Any) -> Any:
    """What is asked in a row, as training joins it: text beside messages is a user's turn."""
    if isinstance(chosen, list) and chosen:
        return join(prompt, [chosen])[0][:-1]
    return prompt or "".join((chosen or "").rpartition(HH_REPLY)[:2])
