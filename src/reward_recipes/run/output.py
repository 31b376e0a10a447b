"""What `output_dir` holds: the names of a run's files, whose run it is, and writing them whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from reward_recipes.run.checkpoints import checkpoints, delete_after, find_damage, latest_valid, step_of
from reward_recipes.run.errors import UserError
from reward_recipes.run.files import replacing

LOG = "reward_model_log.csv"
PICTURE = "training_progress.png"
RECIPE = "recipe.yaml"
AUDIT = "data_audit.json"
TEST_METRICS = "test_metrics.json"
TEST_SCORES = "test_scores.csv"
SUMMARY = "run_summary.json"
EVALUATION, EVALUATION_PAGE, EVALUATION_PICTURE = "evaluation.json", "evaluation.md", "evaluation.png"
STATE_DICT = "reward_model.pt"
ADAPTER = "adapter"

AT_START = (LOG, PICTURE, RECIPE, AUDIT)  # written before the first checkpoint
REPORT = (EVALUATION, EVALUATION_PAGE, EVALUATION_PICTURE)
PUBLISHED = (*AT_START, TEST_METRICS, TEST_SCORES, SUMMARY, *REPORT)
OWN_FILES = (*PUBLISHED, STATE_DICT)
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def find_start(
    output_dir: Path, resume: str | bool | None, overwrite: bool, say: Callable[[str], None] = print
) -> str | None:
    """Decide where a run in `output_dir` starts, before anything is written.

    Args:
        output_dir: the run's folder, which need not exist.
        resume: True for the newest whole checkpoint, or the checkpoint's folder.
        overwrite: whether an earlier run may be deleted.
        say: takes a line about what is resumed, and about each checkpoint that is skipped.

    Returns:
        The checkpoint to resume from, or None to start at step 0.

    Raises:
        UserError: the folder holds another run and neither resuming nor overwriting was asked for; it holds a model
            that no run of this tool wrote; it cannot be a folder; or the checkpoint that was named is not whole or not
            the newest.
    """
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output_dir: expected a folder that can be written, found {existing}; give another")
    if isinstance(resume, str):
        _check_named(output_dir, Path(resume))
        checkpoint = Path(resume)
    else:
        checkpoint = latest_valid(output_dir, say) if resume else None
    if resume and is_finished(output_dir):
        say(f"{output_dir} holds a finished run: nothing to resume")
    elif resume and checkpoint:
        say(f"resuming from {checkpoint}")
    else:
        _refuse_to_delete(output_dir, _run_files(output_dir), resume is True, overwrite)
        if resume:
            say(f"no whole checkpoint in {output_dir}: starting at step 0")
    return str(checkpoint) if checkpoint else None


def _check_named(output_dir: Path, checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise UserError(f"resume_from_checkpoint: expected true or a checkpoint's folder, found {str(checkpoint)!r}")
    if problem := find_damage(checkpoint):
        raise UserError(f"resume_from_checkpoint: expected a whole checkpoint, found {checkpoint}: {problem}; say true")
    if checkpoint.resolve().parent != output_dir.resolve():
        if _run_files(output_dir):
            raise UserError(f"{output_dir} holds another run than {checkpoint}; give another output_dir")
        return
    newest = latest_valid(output_dir)
    if newest and step_of(newest) > step_of(checkpoint):
        raise UserError(
            f"resume_from_checkpoint: expected the newest checkpoint, found {checkpoint}, and {newest} behind it; say "
            "true, or delete the later ones"
        )


def _refuse_to_delete(output_dir: Path, held: list[Path], resume: bool, overwrite: bool) -> None:
    """A run that starts at step 0 deletes what it finds: only if that was asked for, or holds no whole model yet."""
    if held and not (output_dir / RECIPE).is_file():
        raise UserError(
            f"{output_dir} holds files ({held[0].name}) but no {RECIPE}, so another tool wrote them; give another "
            "output_dir"
        )
    broken = checkpoints(output_dir)  # a whole one would have been resumed from
    if not held or overwrite or (resume and all(path.name in AT_START or path in broken for path in held)):
        return
    found = f"({held[0].name}) without a checkpoint to resume from" if resume else f"({held[0].name})"
    or_resume = "" if resume else "continue it with --resume_from_checkpoint true, or "
    raise UserError(
        f"{output_dir} holds another run {found}: give another output_dir, or {or_resume}delete its files with "
        "--overwrite_output_dir true"
    )


def is_finished(output_dir: Path) -> bool:
    """Whether a run came to its end here; the summary is the last file that it writes."""
    return (output_dir / SUMMARY).is_file()


def make_room(output_dir: Path, start: str | None) -> None:
    """Clear the folder of what a run writes anew that starts at a checkpoint, or at step 0 without one."""
    if start is None:
        clear_run(output_dir)
    elif Path(start).resolve().parent == output_dir.resolve():
        delete_after(step_of(Path(start)), output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)


def clear_run(output_dir: Path) -> None:
    """Delete the files of an earlier run, and only files that this tool writes."""
    # The recipe, by which a folder is known as ours, goes last, so that an interrupted clearing can be repeated.
    for path in sorted(_run_files(output_dir), key=lambda path: path.name == RECIPE):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _run_files(output_dir: Path) -> list[Path]:
    found = [output_dir / name for name in OWN_FILES]
    for pattern in MODEL_FILES:
        found += sorted(output_dir.glob(pattern))
    found += checkpoints(output_dir)
    if (output_dir / ADAPTER / "adapter_config.json").is_file():
        found.append(output_dir / ADAPTER)
    return [path for path in found if path.exists()]


def save_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half a file."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def save_state_dict(output_dir: Path) -> None:
    """Write the weights of the model in `output_dir` once more, as the plain state dict `reward_model.pt`."""
    tensors = {}
    for part in sorted(output_dir.glob("model*.safetensors")):
        tensors |= load_file(part)
    with replacing(output_dir / STATE_DICT) as partial, partial.open("wb") as file:
        torch.save(tensors, file)


@contextmanager
def report_write_errors(output_dir: Path) -> Iterator[None]:
    """Turn a failure to write the run's files (disk full, read-only) into a `UserError`; what is written stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"expected to write in {output_dir}, found: {error}; mend that, then continue with "
            "--resume_from_checkpoint true"
        ) from error
