"""What a recipe may say: TRL's fields and ours, and which values are refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, RewardConfig, ScriptArguments

from reward_recipes.pairs import read_columns
from reward_recipes.run import (
    UserError,
    check_accelerator,
    check_hub_fields,
    check_model_init,
    expect,
    fit_to_device,
    option,
    parse_arguments,
    refuse_without_effect,
)

# Fields and the least that they may be.
WHOLE_NUMBERS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataset_num_proc": 1,
    "max_length": 2,
    "max_tokens_per_row": 1,
    "train_probe_size": 0,
    "max_train_samples": 1,
    "max_eval_samples": 1,
    "early_stopping_patience": 1,
}


@dataclass
class RewardRecipeConfig(RewardConfig):
    """TRL's `RewardConfig` with the fields that this package adds, and defaults under which the best model is kept.

    Raises `UserError` for a value that would be ignored or that would silently end with another model.
    """

    eval_strategy: str = option("steps", "When to evaluate: `steps` or `no`.")
    save_strategy: str = option("steps", "When to save a checkpoint: `steps`.")
    eval_steps: int | None = option(None, "Steps between evaluations, a multiple of `logging_steps` (the default).")
    save_steps: int | None = option(None, "Steps between states to resume from. Unset: `eval_steps`, at least 500.")
    save_total_limit: int | None = option(2, "Checkpoints to keep; the best step's weights stay beside them.")
    load_best_model_at_end: bool = option(True, "End with the best step's model; must stay true in runs that evaluate.")
    metric_for_best_model: str = option("accuracy", "What chooses the best model: `accuracy` or `loss`.")

    dataset_data_dirs: list[str] | None = option(None, "Folders inside the dataset; each names a `subset`.")
    columns: dict[str, Any] | str | None = option(None, "Other column names: '{prompt: question}' reads `question`.")
    prompt_marker: str | None = option(None, "What precedes a reply in whole texts, if not `Assistant:` or the like.")
    overlong: str = option("drop", "`drop` pairs over `max_length`, or `keep_end` (cut both sides' beginning alike).")
    pair_packing: str = option("auto", "Share rows and prompts in training: `auto` (where exact), `true`, `false`.")
    max_tokens_per_row: int = option(768, "Largest packed row on a GPU, in tokens; a longer pair has its own.")
    per_device_eval_batch_size: int = option(64, "Maximum pairs of an evaluation batch; fewer if they are long.")
    validation_fraction: float = option(0.0, "Share of the training pairs held out, by first turn, as `validation`.")
    max_train_samples: int | None = option(None, "Maximum number of training pairs; `seed` draws them.")
    max_eval_samples: int | None = option(None, "Maximum pairs of each eval split; `seed` draws them.")
    eval_splits: list[str] | None = option(None, "Splits to evaluate; the first picks the best. Else validation/test.")
    train_probe_size: int = option(512, "Training pairs to evaluate too, for the gap; 0: use the log's accuracy.")
    early_stopping_patience: int | None = option(None, "Stop after so many evaluations without a better one.")
    max_run_time: float | None = option(None, "Hours after which the run saves a checkpoint and ends (status 143).")
    save_state_dict: bool = option(False, "Also write `reward_model.pt`, a state dict.")
    known_ceiling: float | None = option(None, "Best reachable accuracy, if known: a line in the picture.")
    overwrite_output_dir: bool = option(False, "Replace this tool's earlier run in `output_dir`.")

    def __post_init__(self) -> None:
        self._read_words()
        self._check_fields()
        check_hub_fields(self)
        self._check_steps()
        refuse_without_effect(self)
        fit_to_device(self)
        super().__post_init__()
        check_accelerator(self.accelerator_config)

    def _read_words(self) -> None:
        """YAML reads a bare `true` or `no` as a boolean and a single name as no list."""
        self.pair_packing = str(self.pair_packing).lower()
        for name in ("eval_strategy", "save_strategy"):
            if getattr(self, name) is False:
                setattr(self, name, "no")
        for name in ("dataset_data_dirs", "eval_splits"):
            if names := getattr(self, name):
                setattr(self, name, [names] if isinstance(names, str) else [str(each) for each in names])
        self.columns = read_columns(self.columns)
        resume = self.resume_from_checkpoint
        self.resume_from_checkpoint = {"true": True, "false": None, "none": None}.get(str(resume).lower(), resume)

    def _check_fields(self) -> None:
        for name, least in WHOLE_NUMBERS.items():
            value, optional = getattr(self, name), type(self).__dataclass_fields__[name].default is None
            expect((optional and value is None) or _whole(value, least), name, f"{least} or more, whole", value)
        expect(self.pair_packing in ("auto", "true", "false"), "pair_packing", "auto, true or false", self.pair_packing)
        expect(self.overlong in ("drop", "keep_end"), "overlong", "`drop` or `keep_end`", self.overlong)
        fraction, ceiling, share = self.validation_fraction, self.known_ceiling, self.label_smoothing_factor
        expect(0 <= fraction < 1, "validation_fraction", "a share from 0 up to below 1", fraction)
        expect(ceiling is None or 0 < ceiling <= 1, "known_ceiling", "an accuracy up to 1", ceiling)
        expect(0 <= share < 0.5, "label_smoothing_factor", "a share of wrong labels from 0 up to below 0.5", share)
        for name in ("eval_splits", "dataset_data_dirs"):
            expect(getattr(self, name) != [], name, "at least one name", [])
        expect(self.output_dir != "", "output_dir", "a folder for this run", "")
        expect(_whole(self.seed, 0) and self.seed < 2**32, "seed", "a number from 0 to 2**32 - 1", self.seed)
        template, sampling = self.chat_template_path, self.train_sampling_strategy
        expect(template is None or Path(template).is_file(), "chat_template_path", "an existing Jinja file", template)
        expect(sampling != "group_by_length", "train_sampling_strategy", "random or sequential", sampling)
        if fraction and self.eval_splits and "validation" not in self.eval_splits:
            raise UserError(
                f"validation_fraction={fraction} holds out pairs that eval_splits={self.eval_splits} does not name: "
                "add validation there, or set the fraction to 0"
            )

    def _check_steps(self) -> None:
        """Hold evaluation and log to common steps, and see to it that the best model is kept."""
        whole = self.logging_steps >= 1 and float(self.logging_steps).is_integer()
        expect(whole, "logging_steps", "a whole number of steps", self.logging_steps)
        self.logging_steps = int(self.logging_steps)
        expect(self.load_best_model_at_end or self.eval_strategy == "no", "load_best_model_at_end", "true", False)
        self.load_best_model_at_end = False  # Trainer would tie checkpoints to evaluations; our trainer does it
        if self.save_steps is None:
            self.save_steps = max(500, self.eval_steps or self.logging_steps)
        expect(_whole(self.save_steps, 1), "save_steps", "a whole number of steps", self.save_steps)
        expect(self.save_strategy == "steps", "save_strategy", "`steps`", self.save_strategy)
        if self.eval_strategy == "no":
            for name in ("early_stopping_patience", "eval_splits", "max_eval_samples", "validation_fraction"):
                if getattr(self, name):
                    raise UserError(f"{name} would have no effect without evaluation; remove it or set eval_strategy")
            return
        expect(self.eval_strategy == "steps", "eval_strategy", "`steps` or `no`", self.eval_strategy)
        metric = str(self.metric_for_best_model).removeprefix("eval_")
        expect(metric in ("accuracy", "loss"), "metric_for_best_model", "accuracy or loss", metric)
        self.greater_is_better = metric == "accuracy"
        self.eval_steps = self.logging_steps if self.eval_steps is None else self.eval_steps
        expect(_whole(self.eval_steps, 1), "eval_steps", "a whole number of steps", self.eval_steps)
        if self.eval_steps % self.logging_steps:
            raise UserError(
                f"eval_steps must be a multiple of logging_steps, found {self.eval_steps} and {self.logging_steps}: "
                "an evaluation's figures stand on a row of the log"
            )


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def parse_recipe(args: Sequence[str] | None = None, *more: type) -> tuple[Any, ...]:
    """Read `--config RECIPE.yaml` and the command line `args`, which wins.

    Returns:
        `ScriptArguments`, `RewardRecipeConfig`, `ModelConfig`, the options that were given by name, then an instance of
        each of `more`, dataclasses of an entry point that adds fields of its own.

    Raises:
        UserError: unknown key, unreadable YAML, a value out of range, or a field that would be ignored.
    """
    types = (ScriptArguments, RewardRecipeConfig, ModelConfig, *more)
    script, config, model, *others, given = parse_arguments(types, args, page="train")
    refuse_without_effect(script)
    expect(script.dataset_name is not None, "dataset_name", "a hub id, a folder or a file", None)
    expect(model.model_name_or_path is not None, "model_name_or_path", "a hub id or a folder", None)
    trackers = get_available_reporting_integrations()
    expect(set(config.report_to) <= set(trackers), "report_to", f"installed trackers {trackers}", config.report_to)
    check_model_init(config.model_init_kwargs or {})
    return script, config, model, given, *others
