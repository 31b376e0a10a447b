"""What `output_dir` holds: the names of a run's files, whose run it is, and writing them whole."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from reward_recipes.errors import UserError

LOG = "reward_model_log.csv"
PICTURE = "training_progress.png"
RECIPE = "recipe.yaml"
AUDIT = "data_audit.json"
TEST_METRICS = "test_metrics.json"
SUMMARY = "run_summary.json"
STATE_DICT = "reward_model.pt"
ADAPTER = "adapter"

OWN_FILES = (LOG, PICTURE, RECIPE, AUDIT, TEST_METRICS, SUMMARY, STATE_DICT)
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
        UserError: the folder holds another run and neither resuming nor overwriting was asked for, or it is a file.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir: expected a folder, found a file at {output_dir}")
    if isinstance(resume, str):
        if not Path(resume).is_dir():
            raise UserError(f"resume_from_checkpoint: expected true or a checkpoint's folder, found {resume!r}")
        return resume
    if resume:
        return get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    if not overwrite and (held := _run_files(output_dir)):
        raise UserError(
            f"{output_dir} holds another run ({held[0].name}): give another output_dir, or continue it with "
            "--resume_from_checkpoint true, or delete its files with --overwrite_output_dir true"
        )
    return None


def is_finished(output_dir: Path) -> bool:
    """Whether a run came to its end here; the summary is the last file that it writes."""
    return (output_dir / SUMMARY).is_file()


def clear_run(output_dir: Path) -> None:
    """Delete the files of an earlier run, and only files that this tool writes."""
    for path in _run_files(output_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run_files(output_dir: Path) -> list[Path]:
    found = [output_dir / name for name in OWN_FILES]
    for pattern in (*MODEL_FILES, "checkpoint-*[0-9]"):
        found += sorted(output_dir.glob(pattern))
    if (output_dir / ADAPTER / "adapter_config.json").is_file():
        found.append(output_dir / ADAPTER)
    return [path for path in found if path.exists()]


def save_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
