"""Which checkpoints count: those whose files are all there, as the manifest that is written last says."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from reward_recipes.run.errors import UserError
from reward_recipes.run.files import replacing

MANIFEST = "manifest.json"
# torch reports a failed write as RuntimeError. A worse error of that kind shows again in the next step.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
BEST = ("best_metric", "best_global_step", "best_model_checkpoint")
_PREFIX = "checkpoint-"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoint_at(step: int, output_dir: Path) -> Path:
    """The folder of the checkpoint that is saved after a step."""
    return output_dir / f"{_PREFIX}{step}"


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, valid or not, the oldest first."""
    found = [path for path in output_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def write_manifest(checkpoint: Path) -> None:
    """List the files of a complete checkpoint with their hashes: from then on it counts."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(checkpoint).as_posix()] = {"sha256": _sha256(path)}
    with replacing(checkpoint / MANIFEST) as partial:
        partial.write_text(json.dumps(files, indent=2) + "\n")


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint does not count, in words; None if it is valid."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in files.items():
            if _sha256(checkpoint / name) != expected["sha256"]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        missing = Path(error.filename).relative_to(checkpoint)
        return "it was not written to its end" if missing.name == MANIFEST else f"{missing} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    return None


def latest_valid(output_dir: Path, report: Callable[[str], None] = lambda line: None) -> Path | None:
    """The checkpoint to resume from; `report` gets a line about each newer one that is skipped."""
    for checkpoint in reversed(checkpoints(output_dir)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        report(f"skipping {checkpoint}: {damage}")
    return None


def require_valid(best: Path) -> None:
    """Raise `UserError` if the best checkpoint is damaged: Trainer would end with the last model in silence."""
    if damage := find_damage(best):
        raise UserError(
            f"expected the best checkpoint to be whole, found {best}: {damage}; put it back and continue with "
            "--resume_from_checkpoint true, or start anew with --overwrite_output_dir true"
        )


class CheckpointKeeper(TrainerCallback):
    """Completes or discards each checkpoint, and knows the best one that was saved.

    Args:
        limit: checkpoints to keep; the best one always stays. None keeps all.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._best: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """On a resume, find the best checkpoint, whose folder may have been moved.

        Raises:
            UserError: it is gone or damaged, so the best model would be lost.
        """
        if state.best_global_step:
            here = checkpoint_at(state.best_global_step, Path(args.output_dir))
            best = here if here.is_dir() else Path(state.best_model_checkpoint or here)
            require_valid(best)
            state.best_model_checkpoint = str(best)
        self._note_best(state)
        control.should_training_stop = control.should_training_stop or state.global_step >= state.max_steps

    def save(self, write: Callable[[], None], checkpoint: Path, state: TrainerState) -> None:
        """Save a checkpoint, or go on without it if any process cannot write; to be called on all of them.

        Args:
            write: writes this process's files, and meets the other processes as often as they do even if it fails.
            checkpoint: the folder that they go to.
            state: whose best step is the best one that was saved, afterwards.
        """
        failure = _failure_anywhere(write) or _failure_anywhere(partial(self._complete, checkpoint, state))
        if failure is None:
            self._note_best(state)
            return
        vars(state).update(self._best)
        if state.is_world_process_zero:
            shutil.rmtree(checkpoint, ignore_errors=True)
            mend = "look at the disk's space and the folder's rights"
            warnings.warn(f"{checkpoint} could not be written, and training goes on: {failure}; {mend}", stacklevel=2)

    def _note_best(self, state: TrainerState) -> None:
        self._best = {name: getattr(state, name) for name in BEST}

    def _complete(self, checkpoint: Path, state: TrainerState) -> None:
        if state.is_world_process_zero:
            write_manifest(checkpoint)
            rotate_checkpoints(str(checkpoint.parent), self._limit, state.best_model_checkpoint)


def _failure_anywhere(write: Callable[[], None]) -> str | None:
    """Why writing failed on any process; None if it did not."""
    failure = None
    try:
        write()
    except WRITE_ERRORS as error:
        failure = " ".join(str(error).split())
    return next(filter(None, gather_object([failure])), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
