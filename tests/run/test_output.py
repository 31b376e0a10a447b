"""Where a run starts, and what may be deleted: only an earlier run's files, only when asked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reward_recipes.run import UserError, replacing, save_json
from reward_recipes.run.checkpoints import MANIFEST, write_manifest
from reward_recipes.run.output import find_start, make_room

WRITTEN = (
    *("recipe.yaml", "data_audit.json", "reward_model_log.csv", "training_progress.png", "run_summary.json"),
    *("test_metrics.json", "test_scores.csv", "reward_model.pt"),
    *("config.json", "model.safetensors", "tokenizer.json", "vocab.json"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "checkpoint-20/model.safetensors"),
    *("checkpoint-100/trainer_state.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
)
FOREIGN = (
    *("notes.txt", "my_model.safetensors", "checkpoint-best1/model.safetensors", "checkpoint-old", "sub/recipe.yaml"),
    *("reward_model_log.csv.bak", "config.yaml"),
)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_run_comes_back_if_the_new_one_left_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a kill came between any two files that are moved aside or back."""
    run, said, rename = fill(tmp_path / "run", *WRITTEN, *FOREIGN), [], Path.rename

    def only(moves: int, act: Callable[..., object], *args: object) -> bool:
        """Whether `act` came to its end within so many moves."""
        left = iter(range(moves))
        monkeypatch.setattr(Path, "rename", lambda path, new: [next(left), rename(path, new)])
        try:
            act(*args)
        except StopIteration:
            return False
        finally:
            monkeypatch.setattr(Path, "rename", rename)
        return True

    for moves in range(30):
        if only(moves, make_room, run, None):
            assert files(run) == {*FOREIGN, *(f"earlier_run/{name}" for name in WRITTEN)}
            fill(run, "recipe.yaml", "data_audit.json", "best-2/manifest.json", "checkpoint-4/model.safetensors")
        only(moves, find_start, run, None, True, (), said.append)
        assert find_start(run, None, True, say=said.append) is None
        assert files(run) == {*WRITTEN, *FOREIGN}
    assert f"{run} holds its earlier run again: the one that was to replace it left no whole checkpoint" in said
    fill(run, "adapter/notes.txt")
    (run / "adapter" / "adapter_config.json").unlink()  # an adapter of another kind is left
    make_room(run, None)
    write_manifest(fill(run, "recipe.yaml", "checkpoint-4/trainer_state.json") / "checkpoint-4")
    assert find_start(run, True, False) == str(run / "checkpoint-4")
    new = {"recipe.yaml", "checkpoint-4/trainer_state.json", f"checkpoint-4/{MANIFEST}"}
    assert files(run) == {*FOREIGN, *new, "adapter/notes.txt", "adapter/adapter_model.safetensors"}


def test_deleting_a_run_follows_no_link_out_of_it(tmp_path: Path) -> None:
    """A new run that left no checkpoint goes, and the earlier one comes back."""
    fill(tmp_path, "elsewhere/keep.txt", "elsewhere/adapter_config.json", "run/earlier_run/recipe.yaml")
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for name in ("checkpoint-5", "adapter"):
        (run / name).symlink_to(elsewhere)
    (run / "model.safetensors").symlink_to(elsewhere / "keep.txt")
    assert find_start(run, None, True) is None
    assert files(elsewhere) == {"keep.txt", "adapter_config.json"}
    assert [path.name for path in run.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("resume", [None, True])
def test_free_folders_start_at_step_0(resume: bool | None, tmp_path: Path) -> None:
    assert find_start(tmp_path / "new" / "deep", resume, False) is None
    assert find_start(fill(tmp_path, "notes.txt"), resume, False) is None
    assert not (tmp_path / "new").exists()


def test_another_run_is_refused_unless_resumed_or_overwritten(tmp_path: Path) -> None:
    run = fill(tmp_path / "run", "reward_model_log.csv", "recipe.yaml", "checkpoint-300/model.safetensors")
    for step in (20, 100, 9):
        write_manifest(fill(run, f"checkpoint-{step}/trainer_state.json") / f"checkpoint-{step}")
    told = "holds another run .*--resume_from_checkpoint true.*--overwrite_output_dir true"
    with pytest.raises(UserError, match=told):
        find_start(run, None, False)
    assert find_start(run, None, True) is None
    newest = str(run / "checkpoint-100")
    assert find_start(run, True, False) == find_start(run, newest, False) == newest
    assert find_start(tmp_path / "free", newest, False) == newest
    for named, found in (
        (run / "checkpoint-300", "whole checkpoint, found .*300: it was not written to its end"),
        (tmp_path / "gone", "whole checkpoint, found .*gone"),
        (run / "checkpoint-20", "the newest checkpoint"),
    ):
        with pytest.raises(UserError, match=f"resume_from_checkpoint: expected .*{found}"):
            find_start(run, str(named), False)
    make_room(run, newest)
    assert files(run) == {"reward_model_log.csv", "recipe.yaml"} | {
        f"checkpoint-{step}/{name}" for step in (9, 20, 100) for name in ("trainer_state.json", "manifest.json")
    }


def test_any_trace_of_a_run_is_noticed(tmp_path: Path) -> None:
    for name in WRITTEN:
        if "model" not in name or "checkpoint" in name:
            with pytest.raises(UserError, match="holds another run"):
                find_start(fill(tmp_path / name.replace("/", "-"), name, "recipe.yaml"), None, False)


def test_a_model_of_other_origin_is_never_deleted(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", "tokenizer.json", "checkpoint-500/pytorch_model.bin")
    for resume, overwrite in ((None, False), (None, True), (True, False), (True, True)):
        with pytest.raises(UserError, match="of another tool; give another output_dir"):
            find_start(tmp_path, resume, overwrite)
    assert find_start(fill(tmp_path, "recipe.yaml"), None, True) is None


def test_resuming_before_the_first_checkpoint_starts_afresh(tmp_path: Path) -> None:
    """But not where the checkpoints are gone and a model is left, unless the run had come to its end."""
    fill(tmp_path, "recipe.yaml", "data_audit.json", "reward_model_log.csv", "checkpoint-20/model.safetensors")
    assert find_start(tmp_path, True, False) is None
    fill(tmp_path, "model.safetensors")
    with pytest.raises(UserError, match=r"holds another run .*--overwrite_output_dir true"):
        find_start(tmp_path, True, False)
    said: list[str] = []
    assert find_start(fill(tmp_path, "run_summary.json"), True, False, say=said.append) is None
    assert said[-1] == f"{tmp_path} holds a finished run: nothing to resume; it goes on with more epochs or steps"


def test_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "file")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"output_dir: expected a folder .*, found {tmp_path}/file"):
            find_start(path, None, True)


def test_a_file_is_written_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_json(path, {"a": [2, None]})
    with pytest.raises(TypeError):
        save_json(path, {"a": object()})
    with pytest.raises(OSError), replacing(path) as partial:
        partial.write_text("half of")
        raise OSError("disk full")
    assert json.loads(path.read_text()) == {"a": [2, None]} and files(tmp_path) == {"x.json"}
