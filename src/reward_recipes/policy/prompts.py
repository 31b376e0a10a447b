"""Which prompts a policy is asked: taken from the same data sets that reward models are trained on."""

from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.pairs import HH_REPLY, column_kind, encode_rendered, join, load_pairs, render, split_of
from reward_recipes.run import UserError


def load_prompts(
    script: ScriptArguments, data_dirs: list[str] | None, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> Dataset:
    """Load the training split's distinct prompts.

    A prompt is the column `prompt`, or what comes before the last reply in `chosen`: up to `\\n\\nAssistant:` in
    dialogues of HH-RLHF's form, all messages but the last in conversational data.

    Args:
        script: names the data set and its split.
        data_dirs: folders inside the data set.
        tokenizer: the policy's.
        max_prompt_length: longer prompts are left out.

    Returns:
        Columns `prompt` (text or messages) and `input_ids`.

    Raises:
        UserError: data that cannot be read, or without prompts.
    """
    with PartialState().local_main_process_first():
        source = load_pairs(script.dataset_name, script.dataset_config, data_dirs)
        split = split_of(source, script.dataset_train_split, script.dataset_name, "dataset_train_split")
        column = next((name for name in ("prompt", "chosen") if name in split.column_names), None)
        if column is None:
            raise UserError(
                f"{script.dataset_name}: expected a column 'prompt' or 'chosen', found {sorted(split.column_names)}"
            )
        column_kind(split, column, f"{script.dataset_name}, split {script.dataset_train_split}")
        columns = [name for name in ("prompt", "chosen") if name in split.column_names]
        prompts = split.select_columns(columns).map(
            _take_prompts,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=columns,
            desc="Taking prompts",
        )
    if not len(prompts):
        raise UserError(
            f"{script.dataset_name}: expected prompts, found none in {columns}; add a column 'prompt', or give "
            "dialogues as messages or in HH-RLHF's form"
        )
    lengths = np.array([len(ids) for ids in prompts.with_format("numpy")["input_ids"]])
    _, first = np.unique([str(prompt) for prompt in prompts["prompt"]], return_index=True)
    kept = [int(row) for row in sorted(first) if 0 < lengths[row] <= max_prompt_length]
    if not kept:
        raise UserError(
            f"{script.dataset_name}: expected prompts of at most {max_prompt_length} tokens (max_prompt_length), found "
            f"{len(first)} of which none fits"
        )
    PartialState().print(f"{len(kept):,} prompts; {len(first) - len(kept):,} left out as empty or too long")
    return prompts.select(kept)


def _take_prompts(batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    nothing = [None] * len(next(iter(batch.values())))
    rows = zip(batch.get("prompt", nothing), batch.get("chosen", nothing), strict=True)
    prompts = [prompt for prompt in (_prompt(*row) for row in rows) if prompt]
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
