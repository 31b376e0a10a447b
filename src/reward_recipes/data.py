"""What a pair becomes: token ids that fit, why a pair is dropped, and which pairs are held out."""

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
    load_pairs,
    split_by_prompt,
    split_of,
    subset_names,
    usable_pairs,
)
from reward_recipes.run import UserError

VALIDATION = "validation"
SHARE_TOLERANCE = 0.02  # of the pairs, by which a held-out part may miss the share that was asked for


@dataclass(frozen=True)
class PreparedData:
    """Tokenised pairs.

    Attributes:
        train: pairs to train on, columns as `encode_splits` gives them.
        evaluation: eval sets by name, the one that chooses the best model first.
        test: the split to score once at the end; None where the source has none.
        encoded: every split that was read, dropped pairs included, by name: what the audit counts.
        subsets: names that the column `subset` numbers; empty without subsets.
        unread: columns of the source that are not used.
    """

    train: Dataset
    evaluation: dict[str, Dataset]
    test: Dataset | None
    encoded: dict[str, Dataset]
    subsets: list[str]
    unread: tuple[str, ...]

    def audit(self, train_split: str, template: str) -> dict[str, dict[str, Any]]:
        """The audit of all splits; `template` names whose chat template it is."""
        return audit(self.encoded, self.train, train_split, self.evaluation, self.unread, template)

    @property
    def form(self) -> str:
        """`messages` or `text`: what the model is trained on."""
        return "messages" if KnownBy.MESSAGES in self.train.unique("known_by") else "text"


def prepare_data(
    script: ScriptArguments, config: RewardRecipeConfig, tokenizer: PreTrainedTokenizerBase
) -> PreparedData:
    """Load, tokenise, drop, and hold out validation, as the recipe says.

    Raises:
        UserError: what `load_pairs`, `Pairs.checked` and `encode_splits` raise; no such split; no pair left.
    """
    with PartialState().local_main_process_first():
        raw = load_pairs(script.dataset_name, script.dataset_config, config.dataset_data_dirs, config.columns)
        pairs = _pairs_by_split(raw, script, config)
        subsets = subset_names(pairs)
        processes, marker = config.dataset_num_proc, config.prompt_marker
        encoded = encode_splits(pairs, tokenizer, config.max_length, config.overlong, subsets, processes, marker)
    way = "mend the data, or see max_length and overlong"
    usable = {name: usable_pairs(dataset, f"split {name}", way) for name, dataset in encoded.items()}
    train = usable[script.dataset_train_split]
    if config.validation_fraction:
        train, usable[VALIDATION] = _hold_out(train, config)
    evaluation = {name: usable[name] for name in _eval_names(raw, script, config)}
    return PreparedData(
        train=_drawn(train, config.max_train_samples, config.seed),
        evaluation={name: _drawn(part, config.max_eval_samples, config.seed) for name, part in evaluation.items()},
        test=usable.get(script.dataset_test_split),
        encoded=encoded,
        subsets=subsets,
        unread=pairs[script.dataset_train_split].unread,
    )


def _pairs_by_split(raw: Mapping[str, Pairs], script: ScriptArguments, config: RewardRecipeConfig) -> dict[str, Pairs]:
    """The splits that a recipe uses, training first; what is wrong within them comes before what is not there."""
    train, *others = _splits_to_read(raw, script, config)
    pairs = {train: split_of(raw, train, script.dataset_name, "dataset_train_split").checked(with_margin=True)}
    pairs |= {name: raw[name].checked() for name in others if name in raw}
    for name in others:
        option = "dataset_test_split" if name == script.dataset_test_split else "eval_splits"
        split_of(
            raw,
            name,
            script.dataset_name,
            f"{option}, or hold out a part of the training pairs by --validation_fraction",
        )
    return pairs


def _hold_out(train: Dataset, config: RewardRecipeConfig) -> tuple[Dataset, Dataset]:
    """The pairs to train on and the pairs to validate on."""
    fraction, prompts = config.validation_fraction, train.with_format("numpy")["prompt_id"][:]
    kept, held_out = split_by_prompt(prompts, fraction, config.seed)
    asked = fraction * len(train)
    if not len(kept) or not len(held_out) or abs(len(held_out) - asked) > max(1, SHARE_TOLERANCE * len(train)):
        _, sizes = np.unique(prompts, return_counts=True)
        raise UserError(
            f"validation_fraction={fraction}: expected about {asked:.0f} of {len(train)} pairs, found {len(held_out)} "
            f"that can be held out by whole prompts ({len(sizes)} prompts, the largest of {sizes.max()} pairs); change "
            "it, or say by --prompt_marker what stands before a reply"
        )
    return train.select(kept), train.select(held_out)


def _eval_names(raw: Mapping[str, Pairs], script: ScriptArguments, config: RewardRecipeConfig) -> list[str]:
    if config.eval_strategy == "no":
        return []
    validates = config.validation_fraction or VALIDATION in raw
    return config.eval_splits or [VALIDATION if validates else script.dataset_test_split]


def _splits_to_read(raw: Mapping[str, Pairs], script: ScriptArguments, config: RewardRecipeConfig) -> list[str]:
    """Training split first, each split once; the test split may be missing only if nothing else needs it."""
    if config.validation_fraction and VALIDATION in raw:
        raise UserError(
            f"{script.dataset_name} has a validation split of its own: set validation_fraction to 0 and eval_splits to "
            "[validation], or hold out a part of another source"
        )
    wanted = [script.dataset_train_split, *_eval_names(raw, script, config)]
    if config.validation_fraction:
        wanted = [name for name in wanted if name != VALIDATION]
    if script.dataset_test_split in raw:
        wanted.append(script.dataset_test_split)
    return list(dict.fromkeys(wanted))


def _drawn(dataset: Dataset, size: int | None, seed: int) -> Dataset:
    """`size` pairs in their order, or all; of one seed, the smaller draw is a part of the larger one."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:size]))
