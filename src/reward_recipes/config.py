"""What a recipe may say: TRL's fields and ours, read from YAML and command line, validated, written back."""

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from trl import ModelConfig, RewardConfig, ScriptArguments, TrlParser

from reward_recipes.errors import UserError

# Secrets, and the new names that transformers >= 5.23 gives to fields which recipes say under their old ones.
NOT_WRITTEN = (
    "hub_token",
    "push_to_hub_token",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
)

# Accepted by TRL's or transformers' dataclasses but without effect here; silence would mislead. Each has its way out.
NOT_HONOURED = {
    "dataset_streaming": "remove it: pairs are read, audited and cached as a whole",
    "ignore_bias_buffers": "remove it: current models have no such buffers",
    "label_smoothing_factor": "set it to 0: the Bradley-Terry loss of TRL has no label smoothing",
    "prediction_loss_only": "remove it: metrics are computed from all scores",
    "batch_eval_metrics": "remove it: metrics are computed from all scores at once",
    "pad_token": "set the pad token in the tokenizer's own folder",
    "push_to_hub": "train first, then upload output_dir with `hf upload`",
    "neftune_noise_alpha": "remove it: the study and the recipes train without embedding noise",
}


@dataclass
class RewardRecipeConfig(RewardConfig):
    """TRL's `RewardConfig` with the fields that this package adds, and defaults under which the best model is kept.

    Raises `UserError` for a value that would be ignored or that would silently end with another model.
    """

    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: `steps` or `no`."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint: `steps` or `no`."})
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps between evaluations, a multiple of `logging_steps`."}
    )
    save_steps: int | None = field(default=None, metadata={"help": "Follows `eval_steps`; if given, it must be equal."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep; the best one always stays."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best model, not the last."})
    metric_for_best_model: str = field(default="accuracy", metadata={"help": "Evaluation figure that chooses."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses from the log."})

    dataset_data_dirs: list[str] | None = field(
        default=None,
        metadata={"help": "Folders inside the dataset to load; each name fills the `subset` column."},
    )
    overlong: str = field(
        default="drop",
        metadata={
            "help": "Pairs over `max_length`: `drop` them, or `keep_end`: cut the same number of leading tokens from "
            "both sides."
        },
    )
    pair_packing: str = field(
        default="auto",
        metadata={
            "help": "Compute shared prompts once, in packed rows: `auto` (where that is exact), `true`, `false`."
        },
    )
    max_tokens_per_row: int = field(default=1024, metadata={"help": "Most tokens of a packed row."})
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the training pairs held out, by first-turn prompt, as `validation`."},
    )
    eval_splits: list[str] | None = field(
        default=None,
        metadata={"help": "Splits to evaluate; the first chooses the best model. Default: validation, else test."},
    )
    train_probe_size: int = field(
        default=512,
        metadata={"help": "Training pairs scored in eval mode at each evaluation, for an honest gap. 0: off."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better one."}
    )
    save_state_dict: bool = field(default=False, metadata={"help": "Also write `reward_model.pt`, a state dict."})
    known_ceiling: float | None = field(
        default=None,
        metadata={"help": "Best reachable accuracy, known for synthetic data only; drawn and printed."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the files of an earlier run in `output_dir` (only this tool's)."},
    )

    def __post_init__(self) -> None:
        self._check_own_fields()
        self._check_steps()
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.disable_tqdm is None:
            self.disable_tqdm = bool(os.environ.get("CI"))
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        self.resume_from_checkpoint = _as_flag(self.resume_from_checkpoint)
        with warnings.catch_warnings():
            # TRL itself sets the field under its old name, so transformers >= 5.23 would warn at every start.
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            super().__post_init__()
        for name, fix in NOT_HONOURED.items():
            if getattr(self, name, None):
                raise UserError(f"{name}={getattr(self, name)!r} would have no effect; {fix}")

    def _check_own_fields(self) -> None:
        self.pair_packing = str(self.pair_packing).lower()  # YAML reads a bare true as a boolean
        _require(
            self.pair_packing in ("auto", "true", "false"), "pair_packing", "auto, true or false", self.pair_packing
        )
        _require(_whole(self.max_tokens_per_row, 1), "max_tokens_per_row", "1 or more", self.max_tokens_per_row)
        _require(self.overlong in ("drop", "keep_end"), "overlong", "`drop` or `keep_end`", self.overlong)
        _require(
            isinstance(self.validation_fraction, (int, float)) and 0 <= self.validation_fraction < 1,
            "validation_fraction",
            "a share from 0 up to below 1",
            self.validation_fraction,
        )
        _require(_whole(self.train_probe_size, 0), "train_probe_size", "pairs, 0 or more", self.train_probe_size)
        _require(_whole(self.max_length, 2), "max_length", "a number of tokens, at least 2", self.max_length)
        patience = self.early_stopping_patience
        _require(patience is None or _whole(patience, 1), "early_stopping_patience", "1 or more", patience)
        _require(self.eval_splits != [], "eval_splits", "at least one split", self.eval_splits)
        template = self.chat_template_path
        _require(
            template is None or Path(template).is_file(),
            "chat_template_path",
            "an existing Jinja file",
            template,
        )

    def _check_steps(self) -> None:
        """Hold evaluation, checkpoint and log to common steps: the best model is only kept if it was saved."""
        if self.eval_strategy == "no":
            _require(self.save_strategy != "no", "save_strategy", "`steps` when nothing is evaluated", "no")
            self.load_best_model_at_end = False
            self.save_steps = self.save_steps or self.eval_steps or 500
            return
        for name in ("eval_strategy", "save_strategy"):
            _require(getattr(self, name) == "steps", name, "`steps`, or `no` evaluation", getattr(self, name))
        self.logging_steps = int(self.logging_steps) if self.logging_steps == int(self.logging_steps) else 0
        _require(_whole(self.logging_steps, 1), "logging_steps", "a whole number of steps", self.logging_steps)
        self.eval_steps = int(self.logging_steps) if self.eval_steps is None else self.eval_steps
        self.save_steps = self.eval_steps if self.save_steps is None else self.save_steps
        _require(_whole(self.eval_steps, 1), "eval_steps", "a whole number of steps", self.eval_steps)
        if self.eval_steps % self.logging_steps:
            raise UserError(
                f"eval_steps must be a multiple of logging_steps, found {self.eval_steps} and {self.logging_steps}: "
                "an evaluation's figures stand on a row of the log"
            )
        if self.save_steps != self.eval_steps:
            raise UserError(
                f"save_steps must equal eval_steps, found {self.save_steps} and {self.eval_steps}: otherwise the best "
                "model may never be saved; leave save_steps out"
            )


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise UserError(f"{name}: expected {expected}, found {found!r}")


def _as_flag(value: str | bool | None) -> str | bool | None:
    """`--resume_from_checkpoint true` reaches a text field as the word; anything else is a checkpoint's path."""
    return {"true": True, "false": None, "none": None}.get(str(value).lower(), value)


class RecipeParser(TrlParser):
    """TRL's parser over our three dataclasses; its complaints become `UserError`."""

    def __init__(self, dataclass_types: Sequence[type] = (ScriptArguments, RewardRecipeConfig, ModelConfig)) -> None:
        super().__init__(dataclass_types, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise UserError(f"{message}; `--help` lists all options")


def parse_recipe(
    args: Sequence[str] | None = None,
) -> tuple[ScriptArguments, RewardRecipeConfig, ModelConfig]:
    """Read `--config RECIPE.yaml` and the command line, which wins.

    Args:
        args: command line without the program's name; default `sys.argv[1:]`.

    Raises:
        UserError: unknown key, unreadable YAML, a value out of range, or a field that would be ignored.
    """
    args = list(sys.argv[1:] if args is None else args)
    try:
        script, config, model = RecipeParser().parse_args_and_config(args)
    except (ValueError, TypeError, OSError, yaml.YAMLError, IndexError) as error:
        raise UserError(f"recipe: {error}") from error
    for name in ("dataset_streaming", "ignore_bias_buffers"):
        if getattr(script, name):
            raise UserError(f"{name} would have no effect; {NOT_HONOURED[name]}")
    _require(script.dataset_name is not None, "dataset_name", "a hub id, a folder or a file", None)
    _require(model.model_name_or_path is not None, "model_name_or_path", "a hub id or a folder", None)
    num_labels = (config.model_init_kwargs or {}).get("num_labels", 1)
    _require(num_labels == 1, "num_labels", "1, a reward model gives one score", num_labels)
    return script, config, model


def save_recipe(path: Path, *parts: object) -> None:
    """Write the resolved configuration as a YAML recipe that can be run again, without secrets.

    Like a shipped recipe, it holds what differs from the defaults.
    """
    resolved = {}
    for part in parts:
        defaults = type(part)()
        for name, spec in type(part).__dataclass_fields__.items():
            value = _plain(getattr(part, name))
            if spec.init and name not in NOT_WRITTEN and value != _plain(getattr(defaults, name)):
                resolved[name] = value
    path.write_text(yaml.safe_dump(resolved))


def _plain(value: object) -> object:
    """Enums and config objects to the words that a YAML recipe would hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return getattr(value, "value", value)
