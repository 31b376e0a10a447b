"""What `output_dir` holds: the names of a run's files, whose run it is, and writing them whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from reward_recipes.run.checkpoints import (
    EARLIER,
    find_damage,
    latest_valid,
    read_weights,
    require_best,
    saved,
    step_of,
)
from reward_recipes.run.errors import UserError, expect
from reward_recipes.run.files import replacing, save_json

LOG = "reward_model_log.csv"
PICTURE = "training_progress.png"
RECIPE = "recipe.yaml"
AUDIT = "data_audit.json"
TEST_METRICS = "test_metrics.json"
TEST_SCORES = "test_scores.csv"
SUMMARY = "run_summary.json"
WRONG_PAIRS = "## Most confidently wrong"  # the end of the evaluation's page, which quotes the data
EVALUATION, EVALUATION_PAGE, EVALUATION_PICTURE = "evaluation.json", "evaluation.md", "evaluation.png"
BEST_OF_N, BEST_OF_N_PAGE = "best_of_n.json", "best_of_n.md"
STATE_DICT = "reward_model.pt"
ADAPTER = "adapter"
MOVING = f".{EARLIER}.moving"  # while files are moved between it and the output folder

AT_START = (LOG, PICTURE, RECIPE, AUDIT)  # written before the first checkpoint
REPORT = (EVALUATION, EVALUATION_PAGE, EVALUATION_PICTURE)
PUBLISHED = (*AT_START, TEST_METRICS, TEST_SCORES, SUMMARY, *REPORT, BEST_OF_N, BEST_OF_N_PAGE)
MODEL_FILES = (
    *("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja"),
)


def find_start(
    output_dir: Path,
    resume: str | bool | None,
    overwrite: bool,
    length: Sequence[float] = (),
    say: Callable[[str], None] = print,
) -> str | None:
    """Where a run in `output_dir` starts: the folder of a checkpoint, or None for step 0.

    An earlier run that was moved aside is put back first, unless the run that replaced it has a whole checkpoint.

    Args:
        resume: True for the newest whole checkpoint, or the checkpoint's folder.
        overwrite: whether an earlier run may be deleted.
        length: epochs and steps that are asked for; a finished run goes on to another length.
        say: takes lines about what is resumed and what is skipped.

    Raises:
        UserError: the folder cannot be written; a start would delete what was not asked to go, or another tool's model;
            or what is to be resumed from is not whole.
    """
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output_dir: expected a folder that can be written, found {existing}; give another")
    with PartialState().main_process_first():
        _settle_earlier(output_dir, say)
    held, checkpoint = _run_files(output_dir), latest_valid(output_dir, say) if resume else None
    if isinstance(resume, str):
        checkpoint = _named(Path(resume), checkpoint, held, output_dir)
    if resume and is_finished(output_dir, length):
        say(f"{output_dir} holds a finished run: nothing to resume; it goes on with more epochs or steps")
    elif checkpoint:
        require_best(checkpoint, output_dir)
        say(f"resuming from {checkpoint}")
    else:
        _refuse_to_delete(output_dir, held, bool(resume), overwrite)
        if resume:
            say(f"no whole checkpoint in {output_dir}: starting at step 0")
    return str(checkpoint) if checkpoint else None


def _named(checkpoint: Path, newest: Path | None, held: list[Path], output_dir: Path) -> Path:
    """The checkpoint that was asked for; in a folder that holds a run, it must be that run's newest one."""
    damage = find_damage(checkpoint)
    expect(damage is None, "resume_from_checkpoint", "true or a whole checkpoint", f"{checkpoint}: {damage}")
    if held and (newest is None or newest.resolve() != checkpoint.resolve()):
        raise UserError(
            f"resume_from_checkpoint: expected the newest checkpoint of {output_dir}, found {checkpoint}; say true, or "
            "give another output_dir"
        )
    return checkpoint


def _refuse_to_delete(output_dir: Path, held: list[Path], resume: bool, overwrite: bool) -> None:
    """Raise `UserError` if a start at step 0 would delete files, unless that was asked for or no model is whole yet."""
    if held and not (output_dir / RECIPE).is_file():
        raise UserError(f"{output_dir} holds {held[0].name} of another tool; give another output_dir")
    broken = saved(output_dir)  # a whole checkpoint would have been resumed from
    spare = resume and all(path.name in AT_START or path in broken for path in held)
    if held and not overwrite and not spare:
        raise UserError(
            f"{output_dir} holds another run ({held[0].name}); give another output_dir, continue it with "
            "--resume_from_checkpoint true if it has checkpoints, or replace it with --overwrite_output_dir true"
        )


def is_finished(output_dir: Path, length: Sequence[float] = ()) -> bool:
    """Whether a run, of this length if given, came to its end here; the summary is the last file that it writes."""
    summary = output_dir / SUMMARY
    if not summary.is_file() or not length:
        return summary.is_file()
    return json.loads(summary.read_text()).get("length", [*length]) == [*length]


def make_room(output_dir: Path, start: str | None) -> None:
    """Move this tool's files of an earlier run aside, until the new run has a whole checkpoint.

    A run that resumes from `start` deletes only what it saved later, and its summary: it is finished no more.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if start:
        _delete([path for path in saved(output_dir) if step_of(path) > step_of(Path(start))])
        (output_dir / SUMMARY).unlink(missing_ok=True)
    elif held := _run_files(output_dir):
        moving = output_dir / MOVING
        moving.mkdir(exist_ok=True)
        for path in held:
            path.rename(moving / path.name)
        moving.rename(output_dir / EARLIER)


def _settle_earlier(output_dir: Path, say: Callable[[str], None]) -> None:
    """Put the run that was moved aside back, or delete it if it was replaced; a start after a kill repeats the rest."""
    aside, moving = output_dir / EARLIER, output_dir / MOVING
    if aside.is_dir() and (is_finished(output_dir) or latest_valid(output_dir)):
        shutil.rmtree(aside)
    elif aside.is_dir():
        _delete(_run_files(output_dir))
        aside.rename(moving)
    if moving.is_dir():
        for path in moving.iterdir():
            path.rename(output_dir / path.name)
        moving.rmdir()
        say(f"{output_dir} holds its earlier run again: the one that was to replace it left no whole checkpoint")


def _delete(paths: list[Path]) -> None:
    # The recipe, by which a folder is known as ours, goes last, so that an interrupted clearing can be repeated.
    for path in sorted(paths, key=lambda path: path.name == RECIPE):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _run_files(output_dir: Path) -> list[Path]:
    patterns = (*PUBLISHED, STATE_DICT, *MODEL_FILES)
    found = [path for pattern in patterns for path in sorted(output_dir.glob(pattern))] + saved(output_dir)
    adapter = output_dir / ADAPTER
    return [*found, adapter] if (adapter / "adapter_config.json").is_file() else found


def finish(output_dir: Path, summary: dict[str, Any]) -> None:
    """Write the summary, a run's last file, after which no earlier run is needed."""
    save_json(output_dir / SUMMARY, summary)
    shutil.rmtree(output_dir / EARLIER, ignore_errors=True)


def save_state_dict(output_dir: Path) -> None:
    """Write the weights of the model in `output_dir` once more, as the plain state dict `reward_model.pt`."""
    with replacing(output_dir / STATE_DICT) as partial, partial.open("wb") as file:
        torch.save(read_weights(output_dir), file)


@contextmanager
def report_write_errors(output_dir: Path) -> Iterator[None]:
    """Turn a failure to write the run's files (disk full, read-only) into a `UserError`; what is written stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        mend = "mend that, then continue with --resume_from_checkpoint true"
        raise UserError(f"expected to write in {output_dir}, found: {error}; {mend}") from error
