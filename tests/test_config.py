"""A recipe says what runs: what is unknown, mistyped or without effect is refused, and nothing secret is written."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from reward_recipes.config import WHOLE_NUMBERS, parse_recipe
from reward_recipes.run import UserError, save_recipe
from reward_recipes.run.checks import NOT_HONOURED

NEEDED = {"dataset_name": "pairs", "model_name_or_path": "model", "bf16": False}
FOLDER_OF_THIS_TEST = str(Path(__file__).parent)


def parse(folder: Path, *words: str, **options: object) -> tuple[Any, ...]:
    """Parse a recipe of the needed fields and these, with further words of the command line."""
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(NEEDED | options))
    return parse_recipe(["--config", str(path), *words])


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    words = ("--max_length", "64", "--dataset_name", "mine", "--eval_splits", "a", "b")
    given = {"max_length": 32, "learning_rate": "1e-5", "eval_splits": ["c"], "dataset_data_dirs": "one"}
    script, config, model, _ = parse(tmp_path, *words, **given)
    assert (script.dataset_name, model.model_name_or_path) == ("mine", "model")
    assert (config.max_length, config.eval_splits, config.dataset_data_dirs) == (64, ["a", "b"], ["one"])
    assert config.learning_rate == 1e-5  # which YAML reads as a word
    after_an_equals_sign = [f"--config={tmp_path / 'given.yaml'}"]
    assert parse_recipe(after_an_equals_sign)[1].max_length == 32


def test_defaults_keep_the_best_model_or_the_last_without_evaluation(tmp_path: Path) -> None:
    _, config, *_ = parse(tmp_path, logging_steps=5)
    assert (config.eval_strategy, config.save_strategy, config.logging_steps) == ("steps", "steps", 5)
    assert (config.eval_steps, config.save_steps, config.save_total_limit) == (5, 500, 2)
    assert config.metric_for_best_model == "accuracy" and config.greater_is_better
    assert parse(tmp_path, logging_steps=5, eval_steps=2000)[1].save_steps == 2000
    assert parse(tmp_path, logging_steps=5, eval_steps=20, save_steps=30)[1].save_steps == 30
    assert parse(tmp_path, metric_for_best_model="loss")[1].greater_is_better is False
    for config in (parse(tmp_path, eval_strategy=False)[1], parse(tmp_path, "--eval_strategy", "no")[1]):
        assert (config.eval_strategy, config.save_steps) == ("no", 500)
    assert parse(tmp_path, eval_strategy="no", save_steps=7)[1].save_steps == 7


@pytest.mark.parametrize(("launched", "bf16"), [("bf16", True), ("no", False)])
def test_the_launcher_s_precision_holds(launched: str, bf16: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """A recipe's `bf16: false` does not undo `mixed_precision: bf16`; DeepSpeed would refuse the two late."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert parse(tmp_path, use_cpu=True)[1].bf16 is bf16


def test_words_and_yaml_s_booleans_read_alike(tmp_path: Path) -> None:
    packing = {"true": "true", "False": "false", "auto": "auto"}
    resume = {"True": True, "false": None, "none": None, "some/checkpoint-5": "some/checkpoint-5"}
    for name, readings in (("pair_packing", packing), ("resume_from_checkpoint", resume)):
        for word, read in readings.items():
            assert getattr(parse(tmp_path, f"--{name}", word)[1], name) == read
            assert getattr(parse(tmp_path, **{name: yaml.safe_load(word)})[1], name) == read


def test_a_schedule_that_waits_for_the_metric_follows_it(tmp_path: Path) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau"}
    for options, mode in (({}, "max"), ({"metric_for_best_model": "loss"}, "min")):
        assert parse(tmp_path, **plateau, **options)[1].lr_scheduler_kwargs == {"mode": mode}
    for name in ("dispatch_batches", "split_batches"):
        with pytest.raises(UserError, match=f"{name}: expected false"):
            parse(tmp_path, "--accelerator_config", f'{{"{name}": true}}')


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning", "1"], "unknown option: --learning 1"),  # no abbreviations
        (["stray"], "unknown option: stray"),
        (["--max_length", "long"], "--max_length.*invalid int value: 'long'"),
        (["--max_length"], "--max_length.*expected one argument"),
        (["--bf16", "perhaps"], "--bf16.*got perhaps"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "a recipe's file, or a name .*, found 'nowhere.yaml'"),
        (["--config", FOLDER_OF_THIS_TEST], "found: Is a directory"),
        ([], "dataset_name: expected .*, found None"),
        (["--dataset_name", "pairs"], "model_name_or_path: expected .*, found None"),
    ],
)
def test_a_wrong_command_line_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe(words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1,\nb", "line 1, column 4"),
        (b"\ta: 1", r"cannot start any token"),
        (b"- a\n- b\n", "expected a mapping, found list"),
        (b"", "expected a mapping, found NoneType"),
        (b"\xff\xfe\x00", "'utf-8' codec"),
        (b"leraning_rate: 1.0e-5\n", "unknown option: --leraning_rate 1e-05"),
        (b"training: {learning_rate: 1}\n", "unknown option: --training"),
    ],
)
def test_a_recipe_that_is_none_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){message}"):
        parse_recipe(["--config", str(tmp_path / "given.yaml"), "--dataset_name", "d", "--model_name_or_path", "m"])


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        # of another type
        ({"per_device_train_batch_size": 4.5}, "invalid int value: '4.5'"),
        ({"max_length": None}, "2 or more.*found None"),
        ({"max_length": True}, "2 or more.*found True"),
        ({"output_dir": ""}, "expected a folder for this run"),
        ({"model_init_kwargs": "abc"}, "expected a mapping, found 'abc'"),
        # out of range
        ({"overlong": "cut"}, "expected .*keep_end.*, found 'cut'"),
        ({"pair_packing": "maybe"}, "expected .*auto.*, found 'maybe'"),
        ({"validation_fraction": 1}, "expected a share .*, found 1"),
        ({"validation_fraction": float("nan")}, "found nan"),
        ({"known_ceiling": 70}, "accuracy up to 1, found 70"),
        ({"eval_splits": []}, "at least one name"),
        ({"dataset_data_dirs": []}, "at least one name"),
        ({"chat_template_path": "gone.jinja"}, "found 'gone.jinja'"),
        ({"seed": -1}, "expected a number from 0"),
        ({"label_smoothing_factor": 0.5}, "expected a share .*, found 0.5"),
        ({"report_to": "telegraph"}, r"installed trackers \[.*\], found \['telegraph'\]"),
        ({"train_sampling_strategy": "group_by_length"}, "expected random or sequential"),
        # steps that do not meet
        ({"eval_steps": 7, "logging_steps": 5}, "multiple of logging_steps, found 7 and 5"),
        ({"save_steps": 0}, "whole number of steps, found 0"),
        ({"eval_steps": 0}, "whole number of steps, found 0"),
        ({"logging_steps": 0.1}, "found 0.1"),
        ({"load_best_model_at_end": False}, "expected true, found False"),
        ({"eval_strategy": "epoch"}, "expected .*steps.*, found 'epoch'"),
        ({"save_strategy": False}, "expected .*steps.*, found 'no'"),
        # without effect
        ({"hub_model_id": None, "push_to_hub": True}, "expected user/name, found None"),
        ({"hub_model_id": "b", "push_to_hub": True}, "expected user/name, found 'b'"),
        ({"hub_model_id": "a/-b", "push_to_hub": True}, "expected user/name, found 'a/-b'"),
        ({"hub_model_id": "a/b"}, "would have no effect; set push_to_hub"),
        ({"early_stopping_patience": 3, "eval_strategy": "no"}, "would have no effect without"),
        ({"validation_fraction": 0.1, "eval_splits": ["test"]}, "holds out pairs that eval_splits=.* does not name"),
    ],
)
def test_a_value_that_would_mislead_is_refused(options: dict[str, object], fragment: str, tmp_path: Path) -> None:
    """The message names the first option of the case, then what was expected and found."""
    with pytest.raises(UserError, match=f"(?s){next(iter(options))}.*{fragment}"):
        parse(tmp_path, **options)


def test_numbers_below_the_least_or_not_whole_are_refused(tmp_path: Path) -> None:
    for name, least in WHOLE_NUMBERS.items():
        for value in (least - 1, least - 1.5, least + 0.5):
            with pytest.raises(UserError, match=f"{name}.*{value}"):
                parse(tmp_path, **{name: value})


def test_every_field_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    others = {"include_for_metrics": ["loss"], "pad_to_multiple_of": 8, "pad_token": "<p>", "hub_revision": "v1"}
    others |= dict.fromkeys(("dataloader_in_order", "eval_do_concat_batches", "logging_strategy"), False)
    assert set(others) < set(NOT_HONOURED)
    for name in NOT_HONOURED:
        with pytest.raises(UserError, match=f"{name}.* would have no effect; "):
            parse(tmp_path, **{name: others.get(name, True)})


def test_a_written_recipe_is_what_was_given_and_parses_back_to_the_same_run(tmp_path: Path) -> None:
    """The command line wins; secrets go, and what would resume or delete by itself."""
    words = {"max_length": 99, "hub_token": "hf_secret", "overwrite_output_dir": "true", "lr_scheduler_type": "cosine"}
    kept = {
        **{"dataset_data_dirs": ["a", "b"], "dataset_test_split": "final", "output_dir": "runs/one"},
        **{"learning_rate": 3.0e-5, "warmup_steps": 0.03, "logging_steps": 5, "eval_steps": 10, "overlong": "keep_end"},
        **{"validation_fraction": 0.1, "eval_splits": ["validation", "final"], "train_probe_size": 0},
        **{"early_stopping_patience": 2, "known_ceiling": 0.8, "gradient_checkpointing": False, "use_peft": True},
        **{"lora_target_modules": ["q_proj"], "metric_for_best_model": "loss", "pair_packing": False},
    }
    mapping = {"model_init_kwargs": {"token": "hf_other", "torch_dtype": "float32"}}
    line = [text for name, value in words.items() for text in (f"--{name}", str(value))]
    *given, named = parse(tmp_path, *line, **kept | mapping, max_length=77, resume_from_checkpoint=True)
    path = tmp_path / "recipe.yaml"
    save_recipe(path, named)
    written = yaml.safe_load(path.read_text())
    expected = {"max_length": 99, "lr_scheduler_type": "cosine", "model_init_kwargs": {"torch_dtype": "float32"}}
    assert written == NEEDED | kept | expected
    *read, _ = parse_recipe(["--config", str(path)])
    changed = ("hub_token", "overwrite_output_dir", "resume_from_checkpoint", "model_init_kwargs")
    for ours, theirs in zip(given, read, strict=True):
        for field in fields(ours):
            if field.name not in changed:
                assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert [getattr(read[1], name) for name in changed] == [None, False, None, {"torch_dtype": "float32"}]
