"""One run: recipe in; best model, log, picture, audit and test figures out. `python -m reward_recipes.train`."""

from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import ModelConfig, ScriptArguments

from reward_recipes.callback import CSVLogCallback
from reward_recipes.config import RewardRecipeConfig, parse_recipe
from reward_recipes.data import PreparedData, prepare_data
from reward_recipes.evaluate import describe_test, read_log, score_table, summarise, write_test
from reward_recipes.packing import choose_packing, has_dropout, row_limit
from reward_recipes.pairs import format_audit, load_recipe_tokenizer, save_tokenizer
from reward_recipes.push import check_push, push_run
from reward_recipes.run import (
    Lineage,
    Patience,
    StopOnSignal,
    check_processes,
    cost,
    made_from,
    made_with,
    output,
    repeated_pairs,
    report_write_errors,
    run_cli,
    save_recipe,
    settings_that_fit,
    use_console,
)
from reward_recipes.score import load_merged, load_reward_model, merge_adapter, peft_config
from reward_recipes.trainer import PROBE, ExactRewardTrainer


def train(
    script: ScriptArguments,
    config: RewardRecipeConfig,
    model_args: ModelConfig,
    given: dict[str, Any],
    stop: StopOnSignal | None = None,
) -> None:
    """Run a recipe from its data to the files in `output_dir`; unless `stop` listens, a signal ends it at once.

    `given` holds the options that recipe and command line gave, which `recipe.yaml` keeps.

    Raises:
        UserError: a mistake, before anything is trained or deleted; a number that went bad; or a push that failed.
        SystemExit: a signal or `max_run_time` ended training; the newest checkpoint stays.
    """
    stop = stop or StopOnSignal()
    stop.end_after(config.max_run_time)
    check_processes(model_args.use_peft, config.n_gpu)
    if config.push_to_hub:
        check_push(config.hub_token)
    state, output_dir = PartialState(), Path(config.output_dir)
    resume, length = config.resume_from_checkpoint, (config.num_train_epochs, config.max_steps)
    start = output.find_start(output_dir, resume, config.overwrite_output_dir, length, state.print)
    if resume and output.is_finished(output_dir, length):
        return
    environment = made_with(config.device)  # before training: a checkout may move on meanwhile

    state.print("reading data and model")
    tokenizer = load_recipe_tokenizer(config, model_args)
    data = prepare_data(script, config, tokenizer)
    push, config.push_to_hub = config.push_to_hub, False  # Trainer itself would push at every save
    log = CSVLogCallback(config.known_ceiling, clear=partial(_open_output, start, config, given, data))
    trainer = _make_trainer(config, model_args, data, tokenizer, [log, stop])
    pairs = (data.train, [*data.evaluation.values()], data.test)
    trainer.add_callback(Lineage(made_from([script, config, model_args], trainer.model, *pairs)).checked(start))
    use_console(trainer)
    with stop.deferred(), settings_that_fit(begun=lambda: log.begun):
        trainer.train(resume_from_checkpoint=start)
        stop.end_run_if_stopped(trainer.state.global_step, output_dir)
    with report_write_errors(output_dir):
        _save_model(trainer, output_dir, model_args)
        _sum_up(trainer, data, script, environment)
    if push and state.is_main_process:
        print(f"pushed to {push_run(output_dir, config.hub_model_id, config.hub_private_repo, config.hub_token)}")


def _open_output(start: str | None, config: RewardRecipeConfig, given: dict[str, Any], data: PreparedData) -> None:
    """Make room for what the run writes anew, and write what is known before training."""
    output_dir = Path(config.output_dir)
    with report_write_errors(output_dir):
        output.make_room(output_dir, start)
        save_recipe(output_dir / output.RECIPE, given)  # first: it marks the folder as this tool's
        print(format_audit(data.audit))
        output.save_json(output_dir / output.AUDIT, data.audit)
    pairs, processes = len(data.train), PartialState().num_processes
    if repeated := repeated_pairs(pairs, config.per_device_train_batch_size, processes):
        print(f"{repeated:,} of {pairs:,} training pairs are used twice an epoch, so that batches are full")


def _make_trainer(
    config: RewardRecipeConfig,
    model_args: ModelConfig,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
) -> ExactRewardTrainer:
    """The model in its trainer; beside the first eval set go the others, and a fixed sample of the training pairs."""
    model = load_reward_model(model_args, config, tokenizer)
    model.config.reward_recipes["form"] = data.form
    dropout = not config.disable_dropout and (model_args.use_peft or has_dropout(model))
    wanted, width = config.pair_packing, row_limit(config.max_tokens_per_row, config.device)
    layout = choose_packing(wanted, model, data.train, config.max_length, width, dropout)
    first, *others = [*data.evaluation.items()] or [(None, None)]
    side = dict(others)
    if config.train_probe_size and data.evaluation:
        size = min(config.train_probe_size, len(data.train))
        side[PROBE] = data.train.shuffle(seed=config.seed).select(range(size))
    patience = [Patience(config.early_stopping_patience)] if config.early_stopping_patience else []
    with settings_that_fit():
        return ExactRewardTrainer(
            model=model,
            args=config,
            processing_class=tokenizer,
            peft_config=peft_config(model_args),
            train_dataset=data.train,
            eval_dataset=first[1],
            side_datasets=side,
            subsets=data.subsets,
            max_tokens_per_row=width if layout else None,
            layout=layout or "padded",
            callbacks=[*callbacks, *patience],
        )


def _save_model(trainer: ExactRewardTrainer, output_dir: Path, model_args: ModelConfig) -> None:
    """`output_dir` itself becomes a plain model of transformers; an adapter also stands in a folder of its own."""
    if not model_args.use_peft:
        trainer.end_with_best(output_dir)
    else:
        trainer.end_with_best(output_dir / output.ADAPTER)
        tokenizer, config = trainer.processing_class, trainer.model.config
        if trainer.is_world_process_zero():
            config.save_pretrained(output_dir / output.ADAPTER)  # says how long texts may be
            merged = merge_adapter(output_dir / output.ADAPTER, model_args, trainer.args, tokenizer)
            merged.config.reward_recipes = config.reward_recipes
            merged.save_pretrained(output_dir)
            save_tokenizer(tokenizer, output_dir, trainer.args.max_length)
        trainer.accelerator.wait_for_everyone()
        trainer.score_with(load_merged(output_dir, model_args, trainer.args, tokenizer))  # the test's figures are its
    if trainer.args.save_state_dict and trainer.is_world_process_zero():
        output.save_state_dict(output_dir)


def _sum_up(
    trainer: ExactRewardTrainer, data: PreparedData, script: ScriptArguments, environment: dict[str, Any]
) -> None:
    """Score the test split once, with the best model; print and write what the run came to, the summary last."""
    prediction = trainer.predict(data.test, metric_key_prefix="test") if data.test is not None else None
    if not trainer.is_world_process_zero():
        return
    config, output_dir, kept = trainer.args, Path(trainer.args.output_dir), trainer.state.best_global_step
    log = read_log(output_dir / output.LOG)
    summary = summarise(log)
    print(summary)
    if kept and kept != summary.best_step and config.metric_for_best_model.endswith("accuracy"):
        print(f"kept step      {kept:,}: the best step's weights could not be written")
    if config.known_ceiling is not None:
        print(f"known ceiling  {config.known_ceiling:.1%}")
    split = script.dataset_test_split
    if prediction is None:
        print(f"test accuracy  unknown: there is no split {split!r}")
    else:
        figures = prediction.metrics | {"test_split": split, "best_step": kept}
        test = write_test(output_dir, figures, score_table(data.test, prediction.predictions, data.subsets))
        print(describe_test(test, chose_model=split == next(iter(data.evaluation), None)))
    print(f"output         {output_dir}")
    took = cost(trainer.accelerator.unwrap_model(trainer.model), trainer.totals, trainer.packed, log)
    facts = {"kept_step": kept or trainer.state.global_step, "length": (config.num_train_epochs, config.max_steps)}
    facts |= {"processes": trainer.accelerator.num_processes, "engine": trainer.accelerator.distributed_type.value}
    output.finish(output_dir, summary.__dict__ | facts | environment | {"cost": took})


def main() -> None:
    """Parse the recipe and train."""
    stop = StopOnSignal()
    stop.listen()
    train(*parse_recipe(), stop=stop)


if __name__ == "__main__":
    run_cli(main)
