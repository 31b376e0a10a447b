"""A resumed run is the run that saved the checkpoint: what changes its meaning is refused, the rest is said aloud."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from trl import ModelConfig, ScriptArguments
from whole_runs import arguments, assert_same_run, log_of, run

from reward_recipes.config import RewardRecipeConfig
from reward_recipes.run import Lineage, UserError, checkpoints
from reward_recipes.run.lineage import JUDGED_BY, MAY_CHANGE, WITHOUT_INFLUENCE, changes

pytestmark = pytest.mark.usefixtures("sketched")
FIELDS = {spec.name for kind in (ScriptArguments, RewardRecipeConfig, ModelConfig) for spec in fields(kind)}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # names that transformers 5.23 brought
JUDGED = set().union(*JUDGED_BY.values())
Resume = Callable[..., Path]


def test_every_field_has_one_verdict() -> None:
    """A field that nobody has judged is refused; no verdict is left of a field that is gone."""
    told = {name for name in MAY_CHANGE if " " not in name}
    assert (told | WITHOUT_INFLUENCE | JUDGED) - NEWER <= FIELDS
    assert len(told) + len(WITHOUT_INFLUENCE) + len(JUDGED) == len(told | WITHOUT_INFLUENCE | JUDGED)
    # Workers that persist draw one seed instead of many, so that dropout differs.
    meant = {"seed", "learning_rate", "optim", "max_length", "metric_for_best_model", "dataloader_persistent_workers"}
    assert not meant & (told | WITHOUT_INFLUENCE)


def test_a_changed_field_is_refused_or_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {field: "old" for field in FIELDS - WITHOUT_INFLUENCE} | dict.fromkeys(JUDGED_BY, "hash")
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"stateful_callbacks": {}}))
    with pytest.raises(UserError, match="does not say what it was made from"):
        Lineage(before).checked(str(tmp_path))
    saved = {"stateful_callbacks": {"Lineage": Lineage(before).state()}}
    state.write_text(json.dumps(saved))
    assert Lineage(before).checked(str(tmp_path)) and not capsys.readouterr().out
    assert not changes(before | {"load_best_model_at_end": True}, before)  # as an earlier version kept it
    for name in FIELDS - WITHOUT_INFLUENCE:
        after = before | {name: "new"}
        judge = next((judge for judge, judged in JUDGED_BY.items() if name in judged), None)
        if judge:
            assert not changes(before, after)  # another name for the same pairs or weights
            after[judge] = "another hash"
        if name in MAY_CHANGE or judge in MAY_CHANGE:
            Lineage(after).checked(str(tmp_path))
            said = capsys.readouterr().out
            assert name in said and "old" in said and "new" in said
        else:
            with pytest.raises(UserError, match=f"{name}.*old.*new"):
                Lineage(after).checked(str(tmp_path))


@pytest.fixture
def resume(whole: Path, gpt2_dir: Path, data: Path, tmp_path: Path) -> Resume:
    """Goes on, in a copy of the folder, with other options; as finished, or as cut off before its end."""

    def go_on(cut_off: bool = True, **options: object) -> Path:
        output = tmp_path / "run"
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(whole, output)
        if cut_off:
            (output / "run_summary.json").unlink()
            shutil.rmtree(checkpoints(output)[-1])
        source = options.pop("data", data)
        run(*arguments(options.pop("model", gpt2_dir), source, output, **options), "--resume_from_checkpoint", "true")
        return output

    return go_on


def test_what_changes_the_meaning_of_a_run_is_refused_before_anything_is_written(
    resume: Resume, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(data, other)
    lines = (other / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    for options, word in (
        ({"learning_rate": 0.5}, r"learning_rate \(.*, now 0.5\)"),
        ({"validation_fraction": 0.3}, r"training pairs \(validation_fraction: .*now validation_fraction: 0.3"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model"),
        ({"data": other}, "training pairs"),
    ):
        with pytest.raises(UserError, match=f"expected the run that saved .*{word}"):
            resume(**options)
        output = tmp_path / "run"
        assert "learning_rate: 0.5" not in (output / "recipe.yaml").read_text() and len(checkpoints(output)) == 1


@pytest.mark.reliability
def test_what_is_without_influence_is(resume: Resume, whole: Path, tmp_path: Path, data: Path) -> None:
    """Every such field that a run on a CPU without the Hub can change, all at once; another name for the data too."""
    shutil.copytree(data, tmp_path / "moved")
    silent = {"run_name": "x", "project": "x", "log_level": "error", "log_level_replica": "error", "max_run_time": 9}
    silent |= {"dataloader_num_workers": 1, "dataloader_pin_memory": False}
    silent |= {"dataloader_prefetch_factor": 3, "dataset_num_proc": 2, "ddp_timeout": 99}
    silent |= {"log_on_each_node": False, "save_on_each_node": True, "do_train": True, "do_eval": True}
    silent |= {"skip_memory_metrics": False, "torch_empty_cache_steps": 7, "trust_remote_code": True}
    assert_same_run(resume(data=tmp_path / "moved", **silent), whole)


def test_a_finished_run_goes_on_with_more_epochs(
    resume: Resume, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = log_of(whole), log_of(resume(cut_off=False, num_train_epochs=3))
    said = capsys.readouterr().out
    assert "change of num_train_epochs: 2.0, now 3.0" in said and "the learning rate goes from " in said
    assert after[: len(before)] == before and int(after[-1]["step"]) == 1.5 * int(before[-1]["step"])
