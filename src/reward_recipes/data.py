"""What a pair becomes: token ids that fit, why a pair is dropped, and which pairs are held out."""

from dataclasses import dataclass

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.pairs import checked_pairs, encode_pairs, load_pairs, split_by_prompt, subset_names, usable_pairs
from reward_recipes.run import UserError

VALIDATION = "validation"


@dataclass(frozen=True)
class PreparedData:
    """Tokenised pairs.

    Attributes:
        train: pairs to train on, columns as `encode_pairs` gives them.
        evaluation: eval sets by name, the one that chooses the best model first.
        test: the split to score once at the end; None where the source has none.
        encoded: every split that was read, dropped pairs included, by name: what the audit counts.
        subsets: names that the column `subset` numbers; empty without subsets.
    """

    train: Dataset
    evaluation: dict[str, Dataset]
    test: Dataset | None
    encoded: dict[str, Dataset]
    subsets: list[str]


def prepare_data(
    script: ScriptArguments, config: RewardRecipeConfig, tokenizer: PreTrainedTokenizerBase
) -> PreparedData:
    """Load, tokenise, drop, and hold out validation, as the recipe says.

    Raises:
        UserError: what `sources.load_pairs` and `checked_pairs` raise; a split that is not there; no pair left.
    """
    with PartialState().local_main_process_first():
        raw = load_pairs(script.dataset_name, script.dataset_config, config.dataset_data_dirs)
        pairs = _pairs_by_split(raw, script, config)
        subsets = sorted({subset for split in pairs.values() for subset in subset_names(split)})
        encoded = {
            name: encode_pairs(split, tokenizer, config.max_length, config.overlong, subsets, config.dataset_num_proc)
            for name, split in pairs.items()
        }
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
    )


def _pairs_by_split(raw: DatasetDict, script: ScriptArguments, config: RewardRecipeConfig) -> dict[str, Dataset]:
    """The splits that a recipe uses, training first; what is wrong within them comes before what is not there."""
    names = _splits_to_read(raw, script, config)
    pairs = {name: checked_pairs(raw[name], f"{script.dataset_name}, split {name}") for name in names if name in raw}
    for name in names:
        if name not in raw:
            raise UserError(
                f"{script.dataset_name}: expected a split {name!r}, found {sorted(raw)}; name another one, or set "
                "validation_fraction to hold out a part of the training pairs"
            )
    return pairs


def _hold_out(train: Dataset, config: RewardRecipeConfig) -> tuple[Dataset, Dataset]:
    """The pairs to train on and the pairs to validate on."""
    prompts = train.with_format("numpy")["prompt_id"][:]
    kept, held_out = split_by_prompt(prompts, config.validation_fraction, config.seed)
    if not len(kept) or not len(held_out):
        raise UserError(
            f"validation_fraction={config.validation_fraction} of {len(train)} pairs leaves {len(kept)} to train "
            f"on and {len(held_out)} to validate; change it or give more pairs with different first turns"
        )
    return train.select(kept), train.select(held_out)


def _eval_names(raw: DatasetDict, script: ScriptArguments, config: RewardRecipeConfig) -> list[str]:
    if config.eval_strategy == "no":
        return []
    validates = config.validation_fraction or VALIDATION in raw
    return config.eval_splits or [VALIDATION if validates else script.dataset_test_split]


def _splits_to_read(raw: DatasetDict, script: ScriptArguments, config: RewardRecipeConfig) -> list[str]:
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
