"""Which prompts a policy is asked: taken from the same data sets that reward models are trained on."""

from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.pairs import HH_REPLY, Pairs, encode_prompt, join, load_pairs, read_columns, split_of
from reward_recipes.run import UserError, expect, option


@dataclass
class PolicyArguments:
    """Which prompts a policy is asked, and whether what it leaves may replace an earlier run."""

    dataset_data_dirs: list[str] | None = option(None, "Folders inside the dataset whose prompts to take.")
    columns: dict[str, Any] | str | None = option(None, "Other column names: '{prompt: question}' reads `question`.")
    max_prompt_length: int = option(256, "Longer prompts, in tokens, are left out.")
    sample_prompts: int = option(16, "Prompts to answer before and after.")
    sample_split: str | None = option(None, "Split that these prompts come from; by default the training split.")
    sample_steps: int = option(0, "Score sample replies for the log every N updates; 0: never.")
    overwrite_output_dir: bool = option(False, "Replace the files of an earlier run in `output_dir`.")

    def __post_init__(self) -> None:
        if isinstance(self.dataset_data_dirs, str):  # YAML reads one name as no list
            self.dataset_data_dirs = [self.dataset_data_dirs]
        self.columns = read_columns(self.columns)
        expect(self.max_prompt_length >= 1, "max_prompt_length", "1 or more", self.max_prompt_length)
        expect(self.sample_prompts >= 1, "sample_prompts", "1 or more", self.sample_prompts)
        expect(self.sample_steps >= 0, "sample_steps", "0 or more", self.sample_steps)


def load_prompts(
    script: ScriptArguments, args: PolicyArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    """Load the prompts to train on, and those to sample replies to: distinct ones, of at most `max_prompt_length`.

    A prompt is the column `prompt`, or what comes before the last reply in `chosen`: up to `\\n\\nAssistant:` in
    dialogues of HH-RLHF's form, all messages but the last in conversational data.

    Returns:
        Columns `prompt` (text or messages) and `input_ids`, twice.

    Raises:
        UserError: data that cannot be read, or without prompts that fit.
    """
    name, split, sampled = script.dataset_name, script.dataset_train_split, args.sample_split
    with PartialState().local_main_process_first():
        splits = load_pairs(name, script.dataset_config, args.dataset_data_dirs, args.columns)
    asked = prompts = _distinct(split_of(splits, split, name, "dataset_train_split"), tokenizer, args.max_prompt_length)
    if sampled:
        asked = _distinct(split_of(splits, sampled, name, "sample_split"), tokenizer, args.max_prompt_length)
    return prompts, asked.take(min(args.sample_prompts, len(asked)))


def _distinct(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, most: int) -> Dataset:
    known = [column for column in ("prompt", "chosen") if column in pairs.rows.column_names]
    if not known:
        found = sorted((*pairs.rows.column_names, *pairs.unread))
        raise UserError(f"{pairs.name}: expected a column 'prompt' or 'chosen', found {found}; name one by --columns")
    read = [_prompt(row.get("prompt"), row.get("chosen")) for row in map(pairs.row_at, range(len(pairs.rows)))]
    asked = list({str(prompt): prompt for prompt in read if prompt}.values())
    prompts = Dataset.from_dict({"prompt": asked, "input_ids": [encode_prompt(tokenizer, text) for text in asked]})
    kept = [row for row, ids in enumerate(prompts["input_ids"]) if 1 <= len(ids) <= most]
    if not kept:
        raise UserError(
            f"{pairs.name}: expected prompts in {known} of at most {most} tokens (max_prompt_length), found "
            f"{len(asked)} of which none fits; add a column 'prompt', or dialogues as messages or in HH-RLHF's form"
        )
    PartialState().print(f"{len(kept):,} prompts; {len(asked) - len(kept):,} left out as empty or too long")
    return prompts.select(kept)


def _prompt(prompt: Any, chosen: Any) -> Any:
    """What is asked in a row, as training joins it: text beside messages is a user's turn."""
    if isinstance(chosen, list) and chosen:
        return join(prompt, [chosen])[0][:-1]
    return prompt or "".join((chosen or "").rpartition(HH_REPLY)[:2])
