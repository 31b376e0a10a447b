"""What `output_dir` holds: the names of a run's files, whose run it is, and writing them whole."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from reward_recipes.errors import UserError

LOG = "reward_model_log.csv"
PICTURE = "training_progress.png"
RECIPE = "recipe.yaml"
AUDIT = "data_audit.json"
TEST_METRICS = "test_metrics.json"
SUMMARY = "run_summary.json"
STATE_DICT = "reward_model.pt"
ADAPTER = "adapter"

AT_START = (LOG, PICTURE, RECIPE, AUDIT)  # written before the first checkpoint
OWN_FILES = (*AT_START, TEST_METRICS, SUMMARY, STATE_DICT)
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


def find_start(output_dir: Path, resume: str | bool | None, overwrite: bool) -> str | None:
    """Decide where a run in `output_dir` starts, before anything is written.

    Returns:
        The checkpoint to resume from, or None to start at step 0.

    Raises:
        UserError: the folder holds another run and neither resuming nor overwriting was asked for; it holds a model
            that no run of this tool wrote; or it cannot be a folder.
    """
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output_dir: expected a folder that can be written, found {existing}; give another")
    if isinstance(resume, str):
        if not Path(resume).is_dir():
            raise UserError(f"resume_from_checkpoint: expected true or a checkpoint's folder, found {resume!r}")
        if Path(resume).resolve().parent != output_dir.resolve() and _run_files(output_dir):
            raise UserError(f"{output_dir} holds another run than {resume}; give another output_dir")
        return resume
    checkpoint = _newest_checkpoint(output_dir) if resume else None
    held = _run_files(output_dir)
    if checkpoint or not held or (resume and is_finished(output_dir)):
        return checkpoint
    _refuse_to_delete(output_dir, held, resume is True, overwrite)
    return None


def _refuse_to_delete(output_dir: Path, held: list[Path], resume: bool, overwrite: bool) -> None:
    """A run that starts at step 0 deletes what it finds: only if that was asked for, or holds no model yet."""
    if not (output_dir / RECIPE).is_file():
        raise UserError(
            f"{output_dir} holds files ({held[0].name}) but no {RECIPE}, so another tool wrote them; give another "
            "output_dir"
        )
    if overwrite or (resume and all(path.name in AT_START for path in held)):
        return
    found = f"({held[0].name}) without a checkpoint to resume from" if resume else f"({held[0].name})"
    or_resume = "" if resume else "continue it with --resume_from_checkpoint true, or "
    raise UserError(
        f"{output_dir} holds another run {found}: give another output_dir, or {or_resume}delete its files with "
        "--overwrite_output_dir true"
    )


def _newest_checkpoint(output_dir: Path) -> str | None:
    """The trainer's state is the last file of a checkpoint, so without it the run was killed while saving."""
    whole = [path.parent for path in output_dir.glob("checkpoint-*/trainer_state.json")]
    whole = [path for path in whole if path.name[11:].isdigit()]
    return str(max(whole, key=lambda path: int(path.name[11:]))) if whole else None


def is_finished(output_dir: Path) -> bool:
    """Whether a run came to its end here; the summary is the last file that it writes."""
    return (output_dir / SUMMARY).is_file()


def clear_run(output_dir: Path) -> None:
    """Delete the files of an earlier run, and only files that this tool writes."""
    # The recipe, by which a folder is known as ours, goes last, so that an interrupted clearing can be repeated.
    for path in sorted(_run_files(output_dir), key=lambda path: path.name == RECIPE):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _run_files(output_dir: Path) -> list[Path]:
    found = [output_dir / name for name in OWN_FILES]
    for pattern in (*MODEL_FILES, "checkpoint-*"):
        found += sorted(output_dir.glob(pattern))
    found = [path for path in found if not path.name.startswith("checkpoint-") or path.name[11:].isdigit()]
    if (output_dir / ADAPTER / "adapter_config.json").is_file():
        found.append(output_dir / ADAPTER)
    return [path for path in found if path.exists()]


def save_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
