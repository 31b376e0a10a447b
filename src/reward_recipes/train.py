"""One run: recipe in; best model, log, picture, audit and test figures out. `python -m reward_recipes.train`."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, ScriptArguments

from reward_recipes.callback import CSVLogCallback, Patience, draw
from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.data import PreparedData, prepare_data
from reward_recipes.evaluate import compute_reliability_metrics, read_log, summarise
from reward_recipes.packing import choose_packing
from reward_recipes.pairs import audit, format_audit, load_recipe_tokenizer
from reward_recipes.push import check_push, push_run
from reward_recipes.run import (
    Interruption,
    StopOnSignal,
    UserError,
    check_processes,
    cost,
    delete_after,
    output,
    provenance,
    replacing,
    run_cli,
    save_recipe,
    step_of,
)
from reward_recipes.score import load_reward_model, merge_adapter, peft_config
from reward_recipes.trainer import PROBE, ExactRewardTrainer


def train(
    script: ScriptArguments,
    config: RewardRecipeConfig,
    model_args: ModelConfig,
    interruption: Interruption | None = None,
) -> None:
    """Run a recipe from its data to the files in `output_dir`.

    Args:
        script: which data, see TRL.
        config: how to train.
        model_args: which model, see TRL.
        interruption: tells of signals; by default none are waited for.

    Raises:
        UserError: a mistake in recipe, data, model or output folder, before anything is trained or deleted; a number
            that went bad in training; or a push that failed, with the finished run left whole.
        Interrupted: a signal came in training, and a checkpoint was saved.
    """
    interruption = interruption or Interruption()
    _check_surroundings(config, model_args)
    state, output_dir = PartialState(), Path(config.output_dir)
    start = output.find_start(output_dir, config.resume_from_checkpoint, config.overwrite_output_dir, state.print)
    if config.resume_from_checkpoint and output.is_finished(output_dir):
        state.print(f"{output_dir} holds a finished run: nothing to resume")
        return
    if config.resume_from_checkpoint:
        state.print(f"resuming from {start}" if start else f"no whole checkpoint in {output_dir}: starting at step 0")
    made = provenance(config.device)
    if config.disable_tqdm:
        disable_progress_bars()
    tokenizer = load_recipe_tokenizer(config, model_args)
    data = prepare_data(script, config, tokenizer)
    model = load_reward_model(model_args, config, tokenizer)
    packed = choose_packing(config.pair_packing, model, data.train, config.max_length, config.max_tokens_per_row)
    state.wait_for_everyone()
    if state.is_main_process:
        with output.report_write_errors(output_dir):
            _open_output(output_dir, start, script, config, model_args, data)
    push, config.push_to_hub = config.push_to_hub, False  # Trainer itself would push at every save
    trainer = _make_trainer(config, model_args, model, tokenizer, data, packed, interruption)
    with interruption.deferred():
        trainer.train(resume_from_checkpoint=start)
    with output.report_write_errors(output_dir):
        _finish(trainer, data, script, model_args, tokenizer, made)
    if push and state.is_main_process:
        print(f"pushed to {push_run(output_dir, config.hub_model_id, config.hub_private_repo, config.hub_token)}")


def _check_surroundings(config: RewardRecipeConfig, model_args: ModelConfig) -> None:
    """What a recipe asks for that processes, engine or Hub cannot give, before anything is read."""
    check_processes()
    if config.push_to_hub:
        check_push(config.hub_token)
    if model_args.use_peft and is_deepspeed_zero3_enabled():
        raise UserError("use_peft: expected DDP, FSDP or ZeRO-2, found ZeRO-3, where an adapter cannot be merged")


def repeated_pairs(pairs: int, batch_size: int, processes: int) -> int:
    """How many pairs Accelerate repeats in an epoch, so that several processes have equally many full batches."""
    return -pairs % (batch_size * processes) if processes > 1 else 0


def _open_output(
    output_dir: Path,
    start: str | None,
    script: ScriptArguments,
    config: RewardRecipeConfig,
    model_args: ModelConfig,
    data: PreparedData,
) -> None:
    if start is None:
        output.clear_run(output_dir)
    elif Path(start).resolve().parent == output_dir.resolve():
        delete_after(step_of(Path(start)), output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with replacing(output_dir / output.RECIPE) as partial:  # first: it marks the folder as this tool's
        save_recipe(partial, script, config, model_args)
    report = audit(data.encoded, data.train, script.dataset_train_split, data.evaluation)
    print(format_audit(report))
    output.save_json(output_dir / output.AUDIT, report)
    pairs, processes = len(data.train), PartialState().num_processes
    if repeated := repeated_pairs(pairs, config.per_device_train_batch_size, processes):
        print(f"{repeated:,} of {pairs:,} training pairs are used twice an epoch, so that batches are full")


def _make_trainer(
    config: RewardRecipeConfig,
    model_args: ModelConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    packed: bool,
    interruption: Interruption,
) -> ExactRewardTrainer:
    return ExactRewardTrainer(
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=next(iter(data.evaluation.values()), None),
        side_datasets=_side_datasets(data, config),
        subsets=data.subsets,
        max_tokens_per_row=config.max_tokens_per_row if packed else None,
        processing_class=tokenizer,
        peft_config=peft_config(model_args, model),
        callbacks=_callbacks(config, interruption),
    )


def _side_datasets(data: PreparedData, config: RewardRecipeConfig) -> dict[str, Dataset]:
    """The eval sets after the first, and a fixed sample of the training pairs."""
    side = dict(list(data.evaluation.items())[1:])
    if config.train_probe_size and data.evaluation:
        size = min(config.train_probe_size, len(data.train))
        side[PROBE] = data.train.shuffle(seed=config.seed).select(range(size))
    return side


def _callbacks(config: RewardRecipeConfig, interruption: Interruption) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [CSVLogCallback(config.known_ceiling)]
    if config.early_stopping_patience is not None:
        callbacks.append(Patience(config.early_stopping_patience))
    return [*callbacks, StopOnSignal(interruption)]


def _finish(
    trainer: ExactRewardTrainer,
    data: PreparedData,
    script: ScriptArguments,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    made: dict[str, Any],
) -> None:
    """Score the test split once with the best model, save that model, and sum up the run."""
    config, output_dir = trainer.args, Path(trainer.args.output_dir)
    _save_model(trainer, output_dir, model_args, tokenizer)
    test, scores = (None, None) if data.test is None else _test_figures(trainer, data)
    if not trainer.is_world_process_zero():
        return
    if config.save_state_dict:
        parts = sorted(output_dir.glob("model*.safetensors"))
        with replacing(output_dir / output.STATE_DICT) as partial, partial.open("wb") as file:
            torch.save({k: v for part in parts for k, v in load_file(part).items()}, file)
    if test is not None:
        test |= {"test_split": script.dataset_test_split, "best_step": trainer.state.best_global_step}
        output.save_json(output_dir / output.TEST_METRICS, test)
        with replacing(output_dir / output.TEST_SCORES) as partial:
            scores.to_csv(partial, index=False, float_format="%.9g")  # float32 read back as it was
    draw(output_dir, config.known_ceiling)
    log = read_log(output_dir / output.LOG)
    summary = summarise(log)
    kept = trainer.state.best_global_step
    print(summary)
    if kept and kept != summary.best_step and config.metric_for_best_model.endswith("accuracy"):
        print(f"the model is that of step {kept}: the best step's checkpoint could not be written")
    if config.known_ceiling is not None:
        print(f"known ceiling: {config.known_ceiling:.1%}")
    _print_test(
        test, script.dataset_test_split, chose_model=script.dataset_test_split == next(iter(data.evaluation), None)
    )
    print(f"model, log and picture: {output_dir}")
    kept_step = {"kept_step": kept or trainer.state.global_step}
    processes = {"processes": trainer.accelerator.num_processes, "engine": trainer.accelerator.distributed_type.value}
    made = made | {"cost": cost(trainer, trainer.packed, log)}
    output.save_json(output_dir / output.SUMMARY, summary.__dict__ | kept_step | processes | made)


def _print_test(test: dict[str, Any] | None, split: str, chose_model: bool) -> None:
    if test is None:
        print(f"no split {split!r} to score at the end")
        return
    note = " (optimistic: this split chose the model)" if chose_model else ""
    interval = test["test_accuracy_ci95"]
    within = f" (95% interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    print(f"test accuracy: {test['test_accuracy']:.2%}{within} of {test['test_pairs']:,} pairs{note}")


def _test_figures(trainer: ExactRewardTrainer, data: PreparedData) -> tuple[dict[str, Any], pd.DataFrame]:
    """Trainer's figures of the test split, with the interval and the calibration that one look at it allows; and each
    pair's scores.
    """
    prediction = trainer.predict(data.test, metric_key_prefix="test")
    rows, once = np.unique(prediction.label_ids[:, 0], return_index=True)
    table = data.test.select_columns(["row", "prompt_id", "subset", "chosen_length", "rejected_length"]).to_pandas()
    table = table.set_index("row").loc[rows].reset_index()
    table["subset"] = [data.subsets[subset] if subset >= 0 else "" for subset in table["subset"]]
    table[["chosen_score", "rejected_score"]] = prediction.predictions[once]
    figures = compute_reliability_metrics(prediction.predictions[once], table["prompt_id"].to_numpy())
    return prediction.metrics | {f"test_{name}": value for name, value in figures.items()}, table


def _save_model(
    trainer: ExactRewardTrainer, output_dir: Path, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`output_dir` itself becomes a plain model of transformers; an adapter also stands in a folder of its own."""
    if not model_args.use_peft:
        trainer.save_model(str(output_dir))
        return
    trainer.save_model(str(output_dir / output.ADAPTER))
    if trainer.is_world_process_zero():
        trainer.model.config.save_pretrained(output_dir / output.ADAPTER)  # says how long texts may be
        merged = merge_adapter(output_dir / output.ADAPTER, model_args, trainer.args, tokenizer)
        merged.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)


def main() -> None:
    """Parse the recipe and train."""
    interruption = Interruption()
    interruption.listen()
    train(*parse_recipe(), interruption=interruption)


if __name__ == "__main__":
    run_cli(main)
