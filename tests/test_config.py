"""A recipe says what runs: what is unknown, mistyped or without effect is refused, and nothing secret is written."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from reward_recipes.config import parse_recipe
from reward_recipes.run.arguments import check_types, save_recipe
from reward_recipes.run.errors import UserError

NEEDED = {"dataset_name": "pairs", "model_name_or_path": "model", "bf16": False}
FOLDER_OF_THIS_TEST = str(Path(__file__).parent)


def parse(folder: Path, *words: str, **options: object) -> tuple[Any, ...]:
    """Parse a recipe of the needed fields and these, with further words of the command line."""
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(NEEDED | options))
    return parse_recipe(["--config", str(path), *words])


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    words = ("--max_length", "64", "--dataset_name", "mine", "--eval_splits", "a", "b")
    script, config, model, _ = parse(tmp_path, *words, max_length=32, learning_rate="1e-5", eval_splits=["c"])
    assert (script.dataset_name, model.model_name_or_path) == ("mine", "model")
    assert (config.max_length, config.eval_splits) == (64, ["a", "b"])
    assert config.learning_rate == 1e-5  # which YAML reads as a word


def test_recipe_path_after_an_equals_sign(tmp_path: Path) -> None:
    parse(tmp_path, max_length=77)
    assert parse_recipe([f"--config={tmp_path / 'given.yaml'}"])[1].max_length == 77


def test_defaults_keep_the_best_model(tmp_path: Path) -> None:
    _, config, *_ = parse(tmp_path, logging_steps=5)
    assert (config.eval_strategy, config.save_strategy, config.logging_steps) == ("steps", "steps", 5)
    assert (config.eval_steps, config.save_steps, config.save_total_limit) == (5, 5, 2)
    assert config.load_best_model_at_end and config.metric_for_best_model == "accuracy" and config.greater_is_better
    assert parse(tmp_path, logging_steps=5, eval_steps=20)[1].save_steps == 20
    assert parse(tmp_path, metric_for_best_model="loss")[1].greater_is_better is False


def test_without_evaluation_the_last_model_is_kept(tmp_path: Path) -> None:
    for config in (parse(tmp_path, eval_strategy=False)[1], parse(tmp_path, "--eval_strategy", "no")[1]):
        assert (config.eval_strategy, config.load_best_model_at_end, config.save_steps) == ("no", False, 500)
    assert parse(tmp_path, eval_strategy="no", save_steps=7)[1].save_steps == 7


@pytest.mark.parametrize(("value", "packing"), [(True, "true"), (False, "false"), ("auto", "auto"), ("True", "true")])
def test_pair_packing_reads_yaml_s_booleans_and_words(value: object, packing: str, tmp_path: Path) -> None:
    assert parse(tmp_path, pair_packing=value)[1].pair_packing == packing
    assert parse(tmp_path, "--pair_packing", str(value))[1].pair_packing == packing


@pytest.mark.parametrize(
    ("value", "read"),
    [("true", True), ("True", True), ("false", None), ("none", None), ("some/checkpoint-5", "some/checkpoint-5")],
)
def test_resume_reads_words(value: str, read: object, tmp_path: Path) -> None:
    assert parse(tmp_path, "--resume_from_checkpoint", value)[1].resume_from_checkpoint == read
    assert parse(tmp_path, resume_from_checkpoint=yaml.safe_load(value))[1].resume_from_checkpoint == read


def test_one_name_is_a_list_of_one(tmp_path: Path) -> None:
    config = parse(tmp_path, dataset_data_dirs="harmless-base", eval_splits="test")[1]
    assert (config.dataset_data_dirs, config.eval_splits) == (["harmless-base"], ["test"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "1"], "unknown option: --lr 1; remove or correct it"),
        (["--learning", "1"], "unknown option: --learning 1"),  # no abbreviations
        (["stray"], "unknown option: stray"),
        (["--max_length", "long"], "--max_length.*invalid int value: 'long'; `--help`"),
        (["--max_length"], "--max_length.*expected one argument"),
        (["--bf16", "perhaps"], "--bf16.*got perhaps but expected one of"),
        (["--config"], "--config: expected the path of a recipe, found nothing"),
        (["--config", "nowhere.yaml"], "--config: expected a recipe at nowhere.yaml, found: No such file"),
        (["--config", FOLDER_OF_THIS_TEST], "--config: expected a recipe at .*, found: Is a directory"),
        ([], "dataset_name: expected a hub id, a folder or a file, found None"),
        (["--dataset_name", "pairs"], "model_name_or_path: expected a hub id or a folder, found None"),
    ],
)
def test_a_wrong_command_line_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe(words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1,\nb", "recipe: .*line 1, column 4.*expected ',' or ']'"),
        (b"\ta: 1", r"cannot start any token"),
        (b"- a\n- b\n", "must contain a YAML mapping"),
        (b"", "must contain a YAML mapping"),
        (b"\xff\xfe\x00", "recipe: .*'utf-8' codec can't decode"),
        (b"leraning_rate: 1.0e-5\n", "unknown option: --leraning_rate 1e-05; remove or correct it"),
        (b"training: {learning_rate: 1}\n", "unknown option: --training"),
    ],
)
def test_a_recipe_that_is_none_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){message}"):
        parse_recipe(["--config", str(tmp_path / "given.yaml"), "--dataset_name", "d", "--model_name_or_path", "m"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # of another type: YAML's values pass the parser unchecked
        ({"learning_rate": [1]}, r"learning_rate: expected a number, found \[1\]"),
        ({"per_device_train_batch_size": 4.5}, "per_device_train_batch_size: expected a whole number, found 4.5"),
        ({"per_device_train_batch_size": None}, "expected a whole number, found None"),
        ({"max_length": True}, "max_length: expected a whole number or nothing, found True"),
        ({"save_state_dict": 1}, "save_state_dict: expected true or false, found 1"),
        ({"dataset_data_dirs": [1]}, r"dataset_data_dirs: expected a list of texts or nothing, found \[1\]"),
        ({"eval_splits": {"test": 1}}, "eval_splits: expected a list of texts or nothing, found {'test': 1}"),
        ({"dataset_name": ["a"]}, r"dataset_name: expected text or nothing, found \['a'\]"),
        ({"output_dir": 5}, "output_dir: expected text or nothing, found 5"),
        ({"model_init_kwargs": "abc"}, "model_init_kwargs: expected a mapping, found 'abc'"),
        # out of range
        ({"overlong": "cut"}, "overlong: expected `drop` or `keep_end`, found 'cut'"),
        ({"pair_packing": "maybe"}, "pair_packing: expected auto, true or false, found 'maybe'"),
        ({"max_tokens_per_row": 0}, "max_tokens_per_row: expected 1 or more, found 0"),
        ({"validation_fraction": 1}, "validation_fraction: expected a share from 0 up to below 1, found 1"),
        ({"validation_fraction": -0.1}, "validation_fraction: expected a share"),
        ({"validation_fraction": float("nan")}, "validation_fraction: expected a number, found nan"),
        ({"train_probe_size": -1}, "train_probe_size: expected 0 or more, found -1"),
        ({"max_train_samples": 0}, "max_train_samples: expected 1 or more, found 0"),
        ({"max_train_samples": 0.5}, "max_train_samples: expected a whole number or nothing, found 0.5"),
        ({"max_eval_samples": -1}, "max_eval_samples: expected 1 or more, found -1"),
        ({"max_eval_samples": True}, "max_eval_samples: expected a whole number or nothing, found True"),
        ({"max_length": 1}, "max_length: expected 2 or more, found 1"),
        ({"max_length": None}, "max_length: expected 2 or more, found None"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: expected 1 or more, found 0"),
        ({"known_ceiling": 70}, "known_ceiling: expected an accuracy up to 1, found 70"),
        ({"eval_splits": []}, "eval_splits: expected at least one name"),
        ({"dataset_data_dirs": []}, "dataset_data_dirs: expected at least one name"),
        (
            {"chat_template_path": "gone.jinja"},
            "chat_template_path: expected an existing Jinja file, found 'gone.jinja'",
        ),
        ({"seed": -1}, "seed: expected a number from 0"),
        ({"dataset_num_proc": 0}, "dataset_num_proc: expected 1 or more, found 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected 1 or more, found 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size: expected 1 or more, found 0"),
        ({"label_smoothing_factor": 0.5}, "label_smoothing_factor: expected a share of wrong labels.*, found 0.5"),
        ({"label_smoothing_factor": -0.1}, "label_smoothing_factor: expected a share of wrong labels.*, found -0.1"),
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType"),
        ({"report_to": "telegraph"}, r"report_to: expected installed trackers \[.*\], found \['telegraph'\]"),
        ({"model_init_kwargs": {"num_labels": 2}}, "num_labels: expected 1, a reward model gives one score, found 2"),
        # steps that do not meet
        ({"eval_steps": 7, "logging_steps": 5}, "eval_steps must be a multiple of logging_steps, found 7 and 5"),
        (
            {"eval_steps": 10, "save_steps": 20},
            "save_steps must equal eval_steps, found 20 and 10.*leave save_steps out",
        ),
        ({"eval_steps": 0}, "eval_steps: expected a whole number of steps, found 0"),
        ({"eval_steps": 0.1}, "eval_steps: expected a whole number or nothing, found 0.1"),
        ({"logging_steps": 0.1}, "logging_steps: expected a whole number of steps, found 0.1"),
        ({"logging_steps": 0}, "logging_steps: expected a whole number of steps, found 0"),
        ({"eval_strategy": "epoch"}, "eval_strategy: expected `steps`, or `no` evaluation, found 'epoch'"),
        ({"save_strategy": False}, "save_strategy: expected `steps`, or `no` evaluation, found 'no'"),
        ({"save_strategy": "best"}, "save_strategy: expected `steps`"),
        ({"logging_strategy": "epoch"}, "logging_strategy: expected `steps`, found 'epoch'"),
        # without effect
        ({"dataset_streaming": True}, "dataset_streaming would have no effect; remove it"),
        ({"ignore_bias_buffers": True}, "ignore_bias_buffers would have no effect; remove it"),
        ({"push_to_hub": True}, "hub_model_id: expected user/name, found None"),
        ({"push_to_hub": True, "hub_model_id": "b"}, "hub_model_id: expected user/name, found 'b'"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "hub_model_id: expected user/name, found 'a/b/c': Repo id"),
        ({"push_to_hub": True, "hub_model_id": "a/-b"}, "hub_model_id: expected user/name, found 'a/-b': Repo id"),
        ({"hub_model_id": "a/b"}, "hub_model_id='a/b' would have no effect; set push_to_hub to true"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy: expected `end`, found 'checkpoint'"),
        ({"hub_always_push": True}, "hub_always_push=True would have no effect"),
        ({"hub_revision": "v1"}, "hub_revision='v1' would have no effect"),
        ({"pad_token": "<p>"}, "pad_token='<p>' would have no effect; set the pad token in the tokenizer"),
        ({"prediction_loss_only": True}, "prediction_loss_only=True would have no effect"),
        ({"save_only_model": True}, "save_only_model: expected false, because a run cannot be resumed .*, found True"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True would have no effect"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics=.* would have no effect"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 would have no effect"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True would have no effect.*pairs out of the figures"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches: expected true"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: expected random or sequential"),
        ({"eval_strategy": "no", "early_stopping_patience": 3}, "early_stopping_patience would have no effect without"),
        ({"eval_strategy": "no", "validation_fraction": 0.1}, "validation_fraction would have no effect without eval"),
        ({"eval_strategy": "no", "eval_splits": ["test"]}, "eval_splits would have no effect without evaluation"),
        ({"eval_strategy": "no", "max_eval_samples": 5}, "max_eval_samples would have no effect without evaluation"),
        ({"validation_fraction": 0.1, "eval_splits": ["test"]}, "holds out pairs that eval_splits=.* does not name"),
    ],
)
def test_a_value_that_would_mislead_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse(tmp_path, **options)


def test_a_default_may_break_its_own_hint_but_a_given_value_may_not() -> None:
    @dataclass
    class Options:
        name: str = None
        count: int | None = 3
        names: list[str] | None = None
        share: float = 0

    check_types(Options())
    check_types(Options("a", None, ["b"], 1))
    for options in (Options(name=1), Options(count="2"), Options(names=[None]), Options(share=True)):
        with pytest.raises(UserError, match=r"expected .*, found"):
            check_types(options)


def test_written_recipe_parses_back_to_the_same_run(tmp_path: Path) -> None:
    given = parse(
        tmp_path,
        *("--hub_token", "hf_secret", "--overwrite_output_dir", "true"),
        dataset_data_dirs=["a", "b"],
        dataset_test_split="final",
        output_dir="runs/one",
        learning_rate=3.0e-5,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        logging_steps=5,
        eval_steps=10,
        max_length=77,
        overlong="keep_end",
        pair_packing=False,
        validation_fraction=0.1,
        max_train_samples=50,
        max_eval_samples=20,
        eval_splits=["validation", "final"],
        train_probe_size=0,
        early_stopping_patience=2,
        known_ceiling=0.8,
        gradient_checkpointing=False,
        model_init_kwargs={"token": "hf_other", "torch_dtype": "float32"},
        use_peft=True,
        lora_target_modules=["q_proj"],
        metric_for_best_model="loss",
    )
    path = tmp_path / "recipe.yaml"
    save_recipe(path, given[3])
    assert "hf_" not in path.read_text() and "overwrite" not in path.read_text()
    read = parse_recipe(["--config", str(path)])
    for ours, theirs in zip(given[:3], read[:3], strict=True):
        for field in fields(ours):
            if field.name not in ("hub_token", "overwrite_output_dir", "model_init_kwargs"):
                assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert read[1].model_init_kwargs == {"torch_dtype": "float32"}


def test_saved_recipe_holds_what_was_given_on_file_and_command_line(tmp_path: Path) -> None:
    """The command line wins; a secret inside a mapping goes; the options read back are the same."""
    (tmp_path / "given.yaml").write_text(
        "dataset_name: pairs\nmodel_name_or_path: model\nmax_length: 77\nbf16: false\n"
    )
    words = ["--config", str(tmp_path / "given.yaml"), "--max_length", "99", "--eval_splits", "validation", "final"]
    words += ["--lr_scheduler_type", "cosine", "--gradient_checkpointing", "false", "--hub_token", "hf_secret"]
    words += ["--model_init_kwargs", '{"token": "hf_other", "torch_dtype": "float32"}']
    *options, given = parse_recipe(words)
    save_recipe(tmp_path / "recipe.yaml", given)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == {
        "dataset_name": "pairs",
        "model_name_or_path": "model",
        "max_length": 99,
        "bf16": False,
        "eval_splits": ["validation", "final"],
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing": False,
        "model_init_kwargs": {"torch_dtype": "float32"},
    }
    again = parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    for ours, theirs in zip(options, again[:3], strict=True):
        for field in fields(ours):
            if field.name not in ("hub_token", "model_init_kwargs"):
                assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_written_recipe_does_not_resume_or_delete_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    save_recipe(path, parse(tmp_path, resume_from_checkpoint=True, overwrite_output_dir=True)[3])
    _, config, *_ = parse_recipe(["--config", str(path)])
    assert config.resume_from_checkpoint is None and config.overwrite_output_dir is False
