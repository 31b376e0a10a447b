"""A full disk, a folder that cannot be written and a failing tracker cost what they touch, and nothing else."""

import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from toys import config, pairs_judged, random_pairs, tiny_model, tiny_trainer
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from whole_runs import arguments, assert_same_run, before_calls, in_child, log_of, run

from reward_recipes import train as train_module
from reward_recipes.callback import CSVLogCallback
from reward_recipes.evaluate import training_picture
from reward_recipes.evaluate.training_picture import plot_training
from reward_recipes.run import checkpoints, run_cli
from reward_recipes.run.checkpoints import find_damage
from reward_recipes.trainer import ExactRewardTrainer

pytestmark = pytest.mark.usefixtures("sketched")


def before_steps(acts: dict[int, Callable[[], None]], command: list[str]) -> Callable[[], None]:
    """The entry point, which does something before some of its steps, counted from 1."""

    def work() -> None:
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: print(f"warning: {message}")  # pytest collects them otherwise
        sys.argv = ["train", *command]
        with before_calls(ExactRewardTrainer, "training_step", lambda call, *args: acts.get(call + 1, int)()):
            run_cli(train_module.main)

    return work


def largest_file(size: int) -> Callable[[], None]:
    """No file may grow over `size` bytes: the kernel writes what fits and refuses the rest, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("file", ["optimizer.pt", pytest.param("model.safetensors", marks=pytest.mark.reliability)])
def test_a_checkpoint_that_does_not_fit_is_left_out(
    file: str, gpt2_dir: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    """The second of four: safetensors, or torch, runs out of space in the middle of a file."""
    output = tmp_path / "run"
    size = (whole / "checkpoint-16" / file).stat().st_size
    acts = {5: largest_file(size - 4096), 9: largest_file(resource.RLIM_INFINITY)}
    command = arguments(gpt2_dir, data, output, save_total_limit=9)
    status, printed = in_child(before_steps(acts, command))
    assert status == 0, printed[-3000:]
    assert f"{output / 'checkpoint-8'} could not be written, and training goes on: " in printed
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4", "checkpoint-12", "checkpoint-16"]
    assert all(find_damage(path) is None for path in checkpoints(output))
    assert_same_run(output, whole)


def test_the_best_step_is_one_that_was_saved(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """Nothing is learned, so the first evaluation is the best, but its weights do not fit."""
    acts = {1: largest_file(20_000), 5: largest_file(resource.RLIM_INFINITY)}
    command = arguments(gpt2_dir, data, tmp_path / "run", learning_rate=0.0)
    status, printed = in_child(before_steps(acts, command))
    assert status == 0 and "best-4 could not be written, and training goes on: " in printed
    assert "kept step      8: the best step's weights could not be written" in printed
    assert '"best_step": 8' in (tmp_path / "run" / "test_metrics.json").read_text()


def test_rows_that_do_not_fit_wait_and_a_picture_is_left_out(
    gpt2_dir: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of step 6 fits by ten bytes only; that of step 8 brings it along. No half row stays."""
    monkeypatch.setattr(training_picture, "plot_training", plot_training)  # the real one
    output = tmp_path / "run"
    log, seen, picture = output / "reward_model_log.csv", tmp_path / "seen.csv", output / "training_progress.png"
    acts = {
        1: picture.mkdir,  # a folder in its place: neither root nor a roomy disk can replace it by a file
        6: lambda: largest_file(log.stat().st_size + 10)(),
        7: lambda: (largest_file(resource.RLIM_INFINITY)(), seen.write_bytes(log.read_bytes())),
    }
    status, printed = in_child(before_steps(acts, arguments(gpt2_dir, data, output)))
    assert status == 0, printed[-3000:]
    assert f"{log} could not be written, rows wait: File too large" in printed
    assert "no picture: " in printed
    assert seen.read_text().splitlines()[-1].startswith("4,") and seen.read_bytes().endswith(b"\n")
    assert_same_run(output, whole)


def test_a_folder_that_goes_away_loses_nothing_that_was_saved(
    gpt2_dir: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    """From step 6 on a file stands in the folder's place, so that every write fails, for root as well."""
    output, away = tmp_path / "run", tmp_path / "away"
    command = arguments(gpt2_dir, data, output)
    acts = {6: lambda: (output.rename(away), output.write_text("in the way"))}
    status, printed = in_child(before_steps(acts, command))
    assert status == 2 and "Traceback" not in printed
    error = printed.splitlines()[-1]
    assert error.startswith("error: expected the best step's weights to be whole, found ")
    assert "--resume_from_checkpoint true" in error
    for step in (8, 12, 16):
        assert f"checkpoint-{step} could not be written, and training goes on: " in printed
    output.unlink()
    away.rename(output)
    assert [row["step"] for row in log_of(output)] == ["2", "4"]
    run(*command, "--resume_from_checkpoint", "true")
    assert_same_run(output, whole)


def test_no_room_for_the_model_is_told_in_one_line_and_mended_by_resuming(
    gpt2_dir: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    command = arguments(gpt2_dir, data, tmp_path / "run")

    def work() -> None:
        with before_calls(train_module, "_save_model", lambda *args: largest_file(20_000)()):
            before_steps({}, command)()

    status, printed = in_child(work)
    assert status == 2 and "Traceback" not in printed
    error = printed.splitlines()[-1]
    assert error.startswith(f"error: expected to write in {tmp_path / 'run'}, found: ")
    assert error.endswith("mend that, then continue with --resume_from_checkpoint true")
    run(*command, "--resume_from_checkpoint", "true")
    assert_same_run(tmp_path / "run", whole)


class Tracker(TrainerCallback):
    """Reaches nobody: at the start, or after its second log."""

    logs = 0
    starts = True

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        if not self.starts:
            raise ConnectionError("log in first")

    def on_log(self, *args: object, **kwargs: object) -> None:
        type(self).logs += 1
        if self.logs > 2:
            raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_told_and_one_that_cannot_start_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    model = tiny_model("gpt2")
    args = config(tmp_path, report_to=["tensorboard"], eval_strategy="steps", max_steps=4)
    evaluation = pairs_judged(model, [True, False, True])
    trainer = tiny_trainer(model, args, random_pairs(32), evaluation, callbacks=[CSVLogCallback()])
    with pytest.warns(UserWarning, match="Tracker failed and training goes on: ConnectionError: no route"):
        trainer.train()
    assert trainer.state.global_step == 4 and Tracker.logs > 4
    assert [row["step"] for row in log_of(tmp_path)] == ["1", "2", "3", "4"]
    monkeypatch.setattr(Tracker, "starts", False)
    with pytest.raises(ConnectionError, match="log in first"):
        tiny_trainer(model, args, random_pairs(8), evaluation).train()
