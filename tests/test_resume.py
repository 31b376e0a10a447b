"""A run that is killed at any moment and resumed ends as if nothing had happened."""

import random
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from whole_runs import MODES, arguments, assert_same_run, before_calls, copied_at, killed_at, log_of, run

from reward_recipes.run import CheckpointKeeper, UserError, checkpoints, latest_valid
from reward_recipes.run.checkpoints import MANIFEST, find_damage, write_manifest

pytestmark = pytest.mark.usefixtures("sketched")
SEED = 20261123
RESUME = ("--resume_from_checkpoint", "true")
# Evaluations after steps 4, 8, 12 and 16, or 4, 8 and 12, nearly all of them better; states after 6, 12 and the last.
KINDS = {mode: options | {"metric_for_best_model": "loss", "save_steps": 6} for mode, options in MODES.items()}
# Where a run would be killed; step 12, or step 9 of `accumulation`, is between the best weights of step 8 and state 12.
PLACES = (("best", 0), ("best", 1), ("checkpoint", 1), ("step", 11), ("row", 4))
EVENTS = {"best": 29_000, "checkpoint": 120_000, "step": 4000, "row": 190}  # in a call to a place, about
POINTS = [("plain", "best", 2, 15_000), ("accumulation", "row", 3, 100)]


@pytest.fixture(scope="module")
def uninterrupted(gpt2_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a killed run of a kind must equal."""

    @cache
    def finished(mode: str) -> Path:
        output = tmp_path_factory.mktemp("uninterrupted") / mode
        run(*arguments(gpt2_dir, data, output, **KINDS[mode]))
        return output

    return finished


@pytest.fixture(scope="module", params=KINDS)
def left(
    request: pytest.FixtureRequest, gpt2_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[Path]]:
    """What SIGKILL would leave of a kind of run: copies of its folder, where no other process writes."""
    mode, folder = request.param, tmp_path_factory.mktemp("left")
    rng, copies = random.Random(f"{SEED} {mode}"), [folder / str(number) for number in range(len(PLACES))]
    points = []
    for place, call in PLACES:
        call = 15 if (mode, place) == ("accumulation", "step") else call
        points.append((place, call, rng.randrange(EVENTS[place])))
    command = arguments(gpt2_dir, data, folder / "run", **KINDS[mode])
    copied_at(dict(zip(points, copies, strict=True)), folder / "run", command)
    return mode, copies


@pytest.mark.parametrize(("mode", "place", "call", "event"), POINTS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    mode: str, place: str, call: int, event: int, gpt2_dir: Path, data: Path, uninterrupted: Callable, tmp_path: Path
) -> None:
    """In a child, by SIGKILL; the folder is moved before the run goes on."""
    old, new = tmp_path / "old", tmp_path / "new"
    killed_at(place, call, event, arguments(gpt2_dir, data, old, **KINDS[mode]))
    old.rename(new)
    run(*arguments(gpt2_dir, data, new, **KINDS[mode]), *RESUME)
    assert_same_run(new, uninterrupted(mode))


@pytest.mark.reliability
@pytest.mark.parametrize("number", range(len(PLACES)))
def test_a_run_goes_on_from_what_a_kill_leaves(
    number: int, gpt2_dir: Path, data: Path, left: tuple[str, list[Path]], uninterrupted: Callable
) -> None:
    """At 20 points: eight while best weights are written, four while a state is, four between the one and the other."""
    mode, output = left[0], left[1][number]
    run(*arguments(gpt2_dir, data, output, **KINDS[mode]), *RESUME)
    assert_same_run(output, uninterrupted(mode))


def test_any_file_of_a_checkpoint_that_is_cut_or_changed_is_noticed(whole: Path, tmp_path: Path) -> None:
    for checkpoint in checkpoints(whole):
        shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    older, newest = checkpoints(tmp_path)
    names = sorted(path.name for path in newest.iterdir())
    assert {MANIFEST, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < {*names}
    for name in names:
        content = (newest / name).read_bytes()
        middle = len(content) // 2
        for broken in (content[:middle], b"", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
            (newest / name).write_bytes(broken)
            lines: list[str] = []
            assert latest_valid(tmp_path, lines.append) == older, name
            assert len(lines) == 1 and lines[0].startswith(f"skipping {newest}: "), lines
        (newest / name).unlink()
        assert latest_valid(tmp_path) == older
        (newest / name).write_bytes(content)
        assert latest_valid(tmp_path) == newest


def test_a_cut_checkpoint_is_skipped_aloud_and_the_run_ends_the_same(
    gpt2_dir: Path, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest of two: 12 steps are kept."""
    output = shutil.copytree(whole, tmp_path / "run")
    (output / "run_summary.json").unlink()
    kept, broken = checkpoints(output)
    optimizer = broken / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    run(*arguments(gpt2_dir, data, output), *RESUME)
    printed = capsys.readouterr().out
    assert f"skipping {broken}: optimizer.pt is " in printed and f"resuming from {kept}" in printed
    assert_same_run(output, whole)


def test_a_checkpoint_is_always_left(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """With a limit of one: before an older one is deleted the new one is whole."""
    seen: list[list[bool]] = []

    def look(call: int, output_dir: str, limit: int) -> None:
        seen.append([find_damage(path) is None for path in checkpoints(Path(output_dir))])

    options = {"save_total_limit": 1, "max_steps": 6, "eval_steps": 2, "save_steps": 2}
    with before_calls(sys.modules[CheckpointKeeper.__module__], "rotate_checkpoints", look):
        run(*arguments(gpt2_dir, data, tmp_path / "run", **options))
    assert len(seen) >= 3 and all(all(whole) for whole in seen)


def test_broken_best_weights_are_an_error_not_another_best_model(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """Nothing is learned, so the first evaluation stays the best. The error comes before anything is written."""
    output = tmp_path / "run"
    command = arguments(gpt2_dir, data, output, learning_rate=0.0)
    killed_at("step", 10, 0, command)
    (output / "best-4" / "model.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(UserError, match=r"best step's weights .*best-4: model.safetensors is missing"):
        run(*command, *RESUME, "--num_train_epochs", "3")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert latest_valid(output) == output / "checkpoint-8"
    shutil.rmtree(output / "best-4")  # as in a run of an earlier version, whose state names checkpoint 4
    with pytest.raises(UserError, match=r"best step's weights .*best-4: it is not there"):
        run(*command, *RESUME)
    shutil.copytree(output / "checkpoint-4", output / "best-4")
    other = tmp_path / "other"  # goes on from there, and finds the best weights where they are
    run(*command, "--output_dir", str(other), "--resume_from_checkpoint", str(output / "checkpoint-8"))
    assert '"best_step": 4' in (other / "test_metrics.json").read_text()


@pytest.mark.parametrize(("place", "call"), [("step", 7), ("end", 0)])
def test_patience_goes_on_where_it_was(place: str, call: int, gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """Nothing is learned: evaluations 2, 3 and 4 are no better, so a patience of 3 ends the run at step 8 of 16."""
    frozen = {"learning_rate": 0.0, "early_stopping_patience": 3, "eval_steps": 2, "save_steps": 2}
    command = arguments(gpt2_dir, data, tmp_path / "run", **frozen)
    killed_at(place, call, 0, command)
    run(*command, *RESUME)
    assert log_of(tmp_path / "run")[-1]["step"] == "8"


def test_a_run_that_had_come_to_its_end_is_not_trained_further(gpt2_dir: Path, data: Path, tmp_path: Path) -> None:
    """Seven steps end within an epoch of eight; killed before the model was saved."""
    command = arguments(gpt2_dir, data, tmp_path / "run", max_steps=7)
    killed_at("end", 0, 0, command)
    before = log_of(tmp_path / "run")
    run(*command, *RESUME)
    assert log_of(tmp_path / "run") == before and before[-1]["step"] == "7"
    assert before[-1]["eval_accuracy"]  # the last step is evaluated, whatever its number
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_an_earlier_run_is_kept_until_the_new_one_has_a_whole_checkpoint(
    gpt2_dir: Path, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in step 4, before it, the earlier run is back; in step 5, after it, the new run goes on."""
    output = shutil.copytree(whole, tmp_path / "run")
    command = arguments(gpt2_dir, data, output)
    another = [*command, "--seed", "7", "--overwrite_output_dir", "true"]
    killed_at("step", 3, 0, another)
    assert (output / "earlier_run" / "model.safetensors").is_file() and not (output / "model.safetensors").exists()
    run(*command, *RESUME)
    printed = capsys.readouterr().out
    assert "holds its earlier run again" in printed and "finished run: nothing to resume" in printed
    assert_same_run(output, whole)
    killed_at("step", 4, 0, another)
    assert not (output / "earlier_run").exists() and latest_valid(output) == output / "checkpoint-4"


def test_a_manifest_names_every_file_of_every_folder(tmp_path: Path) -> None:
    """Sharded engines write folders; a file that came later is no defect."""
    shard = tmp_path / "shards" / "0.bin"
    shard.parent.mkdir()
    shard.write_bytes(b"abc")
    assert find_damage(tmp_path) == "it was not written to its end"
    write_manifest(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert find_damage(tmp_path) is None
    shard.write_bytes(b"abd")
    assert find_damage(tmp_path) == "shards/0.bin is not as it was written"
    shard.unlink()
    assert find_damage(tmp_path) == "shards/0.bin is missing"
    (tmp_path / MANIFEST).write_text("[1]")
    assert find_damage(tmp_path) == f"its {MANIFEST} cannot be read"
