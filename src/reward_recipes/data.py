"""Which pairs a run trains on, evaluates and tests at the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.pairs import (
    KnownBy,
    Pairs,
    audit,
    encode_splits,
    hold_out,
    load_pairs,
    split_of,
    subset_names,
    usable_pairs,
)
from reward_recipes.run import UserError, numbers_of

VALIDATION = "validation"


@dataclass(frozen=True)
class PreparedData:
    """Tokenised pairs.

    Attributes:
        train: pairs to train on, columns as `encode_splits` gives them.
        evaluation: eval sets by name, the one that chooses the best model first.
        test: the split to score once at the end; None where the source has none.
        subsets: names that the column `subset` numbers; empty without subsets.
        audit: what every split that was read holds, dropped pairs included.
        form: `messages` or `text`, what the model is trained on.
    """

    train: Dataset
    evaluation: dict[str, Dataset]
    test: Dataset | None
    subsets: list[str]
    audit: dict[str, dict[str, Any]]
    form: str


def prepare_data(
    script: ScriptArguments, config: RewardRecipeConfig, tokenizer: PreTrainedTokenizerBase
) -> PreparedData:
    """Load, tokenise, drop, and hold out validation, as the recipe says.

    Raises:
        UserError: what `load_pairs`, `Pairs.checked` and `encode_splits` raise; no such split; no pair left.
    """
    with PartialState().local_main_process_first():
        raw = load_pairs(script.dataset_name, script.dataset_config, config.dataset_data_dirs, config.columns)
        asked, eval_names = _splits_to_read(raw, script, config)
        pairs = {
            name: split_of(raw, name, script.dataset_name, option).checked(
                with_margin=name == script.dataset_train_split
            )
            for name, option in asked.items()
        }
        subsets = subset_names(pairs)
        options = {"num_proc": config.dataset_num_proc, "marker": config.prompt_marker}
        encoded = encode_splits(pairs, tokenizer, config.max_length, config.overlong, subsets, **options)
    way = "mend the data, or see max_length and overlong"
    usable = {name: usable_pairs(dataset, f"split {name}", way) for name, dataset in encoded.items()}
    train = usable[script.dataset_train_split]
    if config.validation_fraction:
        train, usable[VALIDATION] = hold_out(train, config.validation_fraction, config.seed)
    train = _drawn(train, config.max_train_samples, config.seed)
    evaluation = {name: _drawn(usable[name], config.max_eval_samples, config.seed) for name in eval_names}
    template, unread = config.chat_template_path or tokenizer.name_or_path, pairs[script.dataset_train_split].unread
    return PreparedData(
        train=train,
        evaluation=evaluation,
        test=usable.get(script.dataset_test_split),
        subsets=subsets,
        audit=audit(encoded, train, script.dataset_train_split, evaluation, unread, template),
        form="messages" if KnownBy.MESSAGES in numbers_of(train, "known_by") else "text",
    )


def _splits_to_read(
    raw: Mapping[str, Pairs], script: ScriptArguments, config: RewardRecipeConfig
) -> tuple[dict[str, str], list[str]]:
    """Each split to read with the option that asks for it, training first; and the names of the eval sets."""
    if config.validation_fraction and VALIDATION in raw:
        raise UserError(
            f"{script.dataset_name} has a validation split of its own: set validation_fraction to 0 and eval_splits to "
            "[validation], or hold out a part of another source"
        )
    test, held_out = script.dataset_test_split, config.validation_fraction > 0
    names = config.eval_splits or [VALIDATION if held_out or VALIDATION in raw else test]
    names = [] if config.eval_strategy == "no" else names
    asked = {script.dataset_train_split: "dataset_train_split"}
    read = [name for name in names if name != VALIDATION or not held_out]
    asked |= dict.fromkeys(read, "eval_splits, or set --validation_fraction")
    if test in raw or test in asked:  # it may be missing only if nothing else needs it
        asked[test] = "dataset_test_split, or set --validation_fraction"
    return asked, names


def _drawn(dataset: Dataset, size: int | None, seed: int) -> Dataset:
    """`size` pairs in their order, or all; of one seed, the smaller draw is a part of the larger one."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:size]))
