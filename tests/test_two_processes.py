"""Two processes stop together, resume exactly, go on where one cannot write a checkpoint, end where they differ."""

from pathlib import Path

import pytest
import two_process_script
from whole_runs import arguments, assert_same_run, by_two_processes

from reward_recipes.run import checkpoints
from reward_recipes.run.checkpoints import find_damage

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def runs(gpt2_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of all runs, and what was printed."""
    folder = tmp_path_factory.mktemp("two_processes")
    options = {"per_device_train_batch_size": 2, "logging_steps": 4, "metric_for_best_model": "loss"}
    command = arguments(gpt2_dir, data, folder, **options)
    return folder, by_two_processes(two_process_script.__file__, str(folder), *command)


def test_a_signal_to_one_stops_both_and_the_resumed_run_is_the_same(runs: tuple[Path, str]) -> None:
    """The second one gets SIGTERM in the second epoch and inside a logging window."""
    folder, printed = runs
    assert "stopped by SIGTERM after step 11; continue with: accelerate launch --num_processes 2" in printed
    assert "resuming from" in printed and "checkpoint-11" in printed
    assert_same_run(folder / "stopped", folder / "whole")


@pytest.mark.parametrize("failing", ["first", "second"])
def test_a_write_that_fails_on_one_process_costs_one_checkpoint(failing: str, runs: tuple[Path, str]) -> None:
    """After a best step, where Trainer has a barrier: the first one's weights, the second one's random state."""
    folder, printed = runs
    output = folder / failing
    assert f"{output / 'checkpoint-8'} could not be written, and training goes on: [Errno 28] No space left" in printed
    assert (f"{output / 'best-8'} could not be written" in printed) == (failing == "first")
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4", "checkpoint-12", "checkpoint-16"]
    assert all(find_damage(path) is None for path in checkpoints(output))
    assert_same_run(output, folder / "whole")


def test_a_replica_that_differs_ends_the_run(runs: tuple[Path, str]) -> None:
    """One weight of one process, by 1e-4, at the second checkpoint; both processes name the ranks."""
    folder, printed = runs
    found = (
        "step 8: expected the same weights on all processes, found those of rank 0 unlike those of rank 1; "
        f"the newest good checkpoint is {folder / 'apart' / 'checkpoint-4'}"
    )
    assert printed.count(found) == 2
    assert [path.name for path in checkpoints(folder / "apart")] == ["checkpoint-4"]
    assert not (folder / "apart" / "run_summary.json").exists()
