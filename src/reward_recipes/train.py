"""One run: recipe in; best model, log, picture, audit and test figures out. `python -m reward_recipes.train`."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, ScriptArguments

from reward_recipes.callback import CSVLogCallback
from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.data import PreparedData, prepare_data
from reward_recipes.evaluate import add_reliability, describe_test, draw_training, read_log, score_table, summarise
from reward_recipes.packing import choose_packing
from reward_recipes.pairs import audit, format_audit, load_recipe_tokenizer
from reward_recipes.push import check_push, push_run
from reward_recipes.run import (
    Interruption,
    Patience,
    StopOnSignal,
    UserError,
    check_processes,
    cost,
    delete_after,
    made_with,
    output,
    repeated_pairs,
    replacing,
    report_write_errors,
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
    given: dict[str, Any],
    interruption: Interruption | None = None,
) -> None:
    """Run a recipe from its data to the files in `output_dir`.

    Args:
        script: which data, see TRL.
        config: how to train.
        model_args: which model, see TRL.
        given: the options that recipe and command line gave, which `recipe.yaml` keeps.
        interruption: notes signals; by default none are waited for.

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
    environment = made_with(config.device)  # before training: a checkout may move on meanwhile

    tokenizer = load_recipe_tokenizer(config, model_args)
    data = prepare_data(script, config, tokenizer)
    model = load_reward_model(model_args, config, tokenizer)
    packed = choose_packing(config.pair_packing, model, data.train, config.max_length, config.max_tokens_per_row)
    state.wait_for_everyone()
    if state.is_main_process:
        with report_write_errors(output_dir):
            _open_output(output_dir, start, script, config, given, data)

    push, config.push_to_hub = config.push_to_hub, False  # Trainer itself would push at every save
    stop = StopOnSignal(interruption)
    patience = [Patience(config.early_stopping_patience)] if config.early_stopping_patience else []
    trainer = ExactRewardTrainer(
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=next(iter(data.evaluation.values()), None),
        side_datasets=_side_datasets(data, config),
        subsets=data.subsets,
        max_tokens_per_row=config.max_tokens_per_row if packed else None,
        processing_class=tokenizer,
        peft_config=peft_config(model_args, model),
        callbacks=[CSVLogCallback(config.known_ceiling), *patience, stop],
    )
    with interruption.deferred():
        trainer.train(resume_from_checkpoint=start)
        stop.end_run_if_stopped(trainer.state.global_step, output_dir)
    with report_write_errors(output_dir):
        _save_model(trainer, output_dir, model_args, tokenizer)
        test = _score_test_split(trainer, data, script, output_dir)
        if state.is_main_process:
            _sum_up(trainer, data, script, test, environment)
    if push and state.is_main_process:
        print(f"pushed to {push_run(output_dir, config.hub_model_id, config.hub_private_repo, config.hub_token)}")


def _check_surroundings(config: RewardRecipeConfig, model_args: ModelConfig) -> None:
    """What a recipe asks for that processes, engine or Hub cannot give, before anything is read."""
    check_processes()
    if config.push_to_hub:
        check_push(config.hub_token)
    if model_args.use_peft and is_deepspeed_zero3_enabled():
        raise UserError("use_peft: expected DDP, FSDP or ZeRO-2, found ZeRO-3, where an adapter cannot be merged")
    if config.disable_tqdm:
        disable_progress_bars()


def _open_output(
    output_dir: Path,
    start: str | None,
    script: ScriptArguments,
    config: RewardRecipeConfig,
    given: dict[str, Any],
    data: PreparedData,
) -> None:
    """Clear the folder of what the run writes anew, and write what is known before training."""
    if start is None:
        output.clear_run(output_dir)
    elif Path(start).resolve().parent == output_dir.resolve():
        delete_after(step_of(Path(start)), output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with replacing(output_dir / output.RECIPE) as partial:  # first: it marks the folder as this tool's
        save_recipe(partial, given)
    report = audit(data.encoded, data.train, script.dataset_train_split, data.evaluation)
    print(format_audit(report))
    output.save_json(output_dir / output.AUDIT, report)
    pairs, processes = len(data.train), PartialState().num_processes
    if repeated := repeated_pairs(pairs, config.per_device_train_batch_size, processes):
        print(f"{repeated:,} of {pairs:,} training pairs are used twice an epoch, so that batches are full")


def _side_datasets(data: PreparedData, config: RewardRecipeConfig) -> dict[str, Dataset]:
    """The eval sets after the first, and a fixed sample of the training pairs."""
    side = dict(list(data.evaluation.items())[1:])
    if config.train_probe_size and data.evaluation:
        size = min(config.train_probe_size, len(data.train))
        side[PROBE] = data.train.shuffle(seed=config.seed).select(range(size))
    return side


def _save_model(
    trainer: ExactRewardTrainer, output_dir: Path, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`output_dir` itself becomes a plain model of transformers; an adapter also stands in a folder of its own."""
    if not model_args.use_peft:
        trainer.save_model(str(output_dir))
    else:
        trainer.save_model(str(output_dir / output.ADAPTER))
        if trainer.is_world_process_zero():
            trainer.model.config.save_pretrained(output_dir / output.ADAPTER)  # says how long texts may be
            merge_adapter(output_dir / output.ADAPTER, model_args, trainer.args, tokenizer).save_pretrained(output_dir)
            tokenizer.save_pretrained(output_dir)
    if trainer.args.save_state_dict and trainer.is_world_process_zero():
        output.save_state_dict(output_dir)


def _score_test_split(
    trainer: ExactRewardTrainer, data: PreparedData, script: ScriptArguments, output_dir: Path
) -> dict[str, Any] | None:
    """Score the test split once, with the best model, and write its figures and each pair's scores."""
    if data.test is None:
        return None
    prediction = trainer.predict(data.test, metric_key_prefix="test")
    table = score_table(data.test, prediction.predictions, data.subsets)
    figures = add_reliability(prediction.metrics, table)
    figures |= {"test_split": script.dataset_test_split, "best_step": trainer.state.best_global_step}
    if trainer.is_world_process_zero():
        output.save_json(output_dir / output.TEST_METRICS, figures)
        with replacing(output_dir / output.TEST_SCORES) as partial:
            table.to_csv(partial, index=False, float_format="%.9g")  # float32 read back as it was
    return figures


def _sum_up(
    trainer: ExactRewardTrainer,
    data: PreparedData,
    script: ScriptArguments,
    test: dict[str, Any] | None,
    environment: dict[str, Any],
) -> None:
    """Draw, print and write what the run came to; the summary is its last file."""
    config, output_dir, kept = trainer.args, Path(trainer.args.output_dir), trainer.state.best_global_step
    draw_training(output_dir, config.known_ceiling)
    log = read_log(output_dir / output.LOG)
    summary = summarise(log)
    print(summary)
    if kept and kept != summary.best_step and config.metric_for_best_model.endswith("accuracy"):
        print(f"the model is that of step {kept}: the best step's checkpoint could not be written")
    if config.known_ceiling is not None:
        print(f"known ceiling: {config.known_ceiling:.1%}")
    split = script.dataset_test_split
    chose_model = split == next(iter(data.evaluation), None)
    print(f"no split {split!r} to score at the end" if test is None else describe_test(test, chose_model))
    print(f"model, log and picture: {output_dir}")
    took = cost(trainer.accelerator.unwrap_model(trainer.model), trainer.totals, trainer.packed, log)
    processes, engine = trainer.accelerator.num_processes, trainer.accelerator.distributed_type.value
    kept_step = kept or trainer.state.global_step
    facts = {"kept_step": kept_step, "processes": processes, "engine": engine, **environment, "cost": took}
    output.save_json(output_dir / output.SUMMARY, summary.__dict__ | facts)


def main() -> None:
    """Parse the recipe and train."""
    interruption = Interruption()
    interruption.listen()
    train(*parse_recipe(), interruption=interruption)


if __name__ == "__main__":
    run_cli(main)
