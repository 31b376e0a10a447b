"""Which checkpoints count: those whose files are all there, as the manifest that is written last says.

`checkpoint-STEP` is a state to resume from. `best-STEP` holds the weights of the best step alone, written when an
evaluation improves the metric. It is deleted when neither the run nor a kept state names it as best.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints

from reward_recipes.run.errors import UserError
from reward_recipes.run.files import save_json

MANIFEST = "manifest.json"
# torch reports a failed write as RuntimeError. A worse error of that kind shows again in the next step.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
STATE, WEIGHTS, TRAINER_STATE = "checkpoint", "best", "trainer_state.json"
EARLIER = "earlier_run"  # moved aside until the run that replaces it has a whole checkpoint


def step_of(folder: Path) -> int:
    """The step after which a folder was saved."""
    return int(folder.name.rpartition("-")[2])


def checkpoint_at(step: int, output_dir: Path, kind: str = STATE) -> Path:
    """The folder of the checkpoint, or of the best weights, that are saved after a step."""
    return output_dir / f"{kind}-{step}"


def checkpoints(output_dir: Path, kind: str = STATE) -> list[Path]:
    """The checkpoints of a run, or its best weights, valid or not, the oldest first."""
    found = [path for path in output_dir.glob(f"{kind}-*") if path.name.removeprefix(f"{kind}-").isdigit()]
    return sorted(found, key=step_of)


def saved(output_dir: Path) -> list[Path]:
    """The checkpoints and the best weights of a run."""
    return checkpoints(output_dir) + checkpoints(output_dir, WEIGHTS)


def write_manifest(checkpoint: Path) -> None:
    """List the files of a complete checkpoint with their hashes: from then on it counts."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
    hashes = {path.relative_to(checkpoint).as_posix(): {"sha256": _sha256(path)} for path in files}
    save_json(checkpoint / MANIFEST, hashes)


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


def require_best(checkpoint: Path, output_dir: Path) -> None:
    """Raise `UserError` if the best weights that a checkpoint names are damaged: the best model would be lost."""
    if best := _best_weights(json.loads((checkpoint / TRAINER_STATE).read_text()), output_dir):
        _require_valid(best)


def _best_weights(state: Mapping[str, Any], output_dir: Path) -> Path | None:
    """The weights of the best step of a `TrainerState`; a run that goes on in another folder left them in the first."""
    if not state.get("best_global_step"):
        return None
    here = checkpoint_at(state["best_global_step"], output_dir, WEIGHTS)
    return here if here.is_dir() else Path(state["best_model_checkpoint"] or here).with_name(here.name)


def _require_valid(best: Path) -> None:
    if damage := find_damage(best) if best.is_dir() else "it is not there; an earlier version wrote none":
        raise UserError(
            f"expected the best step's weights to be whole, found {best}: {damage}; put it back and continue with "
            "--resume_from_checkpoint true, or start anew with --overwrite_output_dir true"
        )


class CheckpointKeeper(TrainerCallback):
    """Completes or discards what is saved, keeps `limit` checkpoints or all, and knows the best step that is there."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self.best: Path | None = None  # the folder of the best weights
        self._noted: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """On a resume, find the best weights; a run that had come to its end is trained no further."""
        self.best = _best_weights(vars(state), Path(args.output_dir))
        self._note_best(state)
        control.should_training_stop = control.should_training_stop or state.global_step >= state.max_steps

    def save(self, write: Callable[[], None], folder: Path, state: TrainerState) -> bool:
        """Save a checkpoint or weights, or go on without if any process cannot write; to be called on all of them.

        `write` puts files of this process into `folder`, and meets the others as often as they do even if it fails.
        """
        failure = _failure_anywhere(write) or _failure_anywhere(partial(self._complete, folder, state))
        if failure and state.is_world_process_zero:
            shutil.rmtree(folder, ignore_errors=True)
            mend = "look at the disk's space and the folder's rights"
            warnings.warn(f"{folder} could not be written, and training goes on: {failure}; {mend}", stacklevel=2)
        return not failure

    def save_best(self, write: Callable[[str], None], output_dir: Path, state: TrainerState) -> None:
        """Save the weights of a new best step in the same way; if they cannot be written, the one before stays best."""
        folder = checkpoint_at(state.global_step, output_dir, WEIGHTS)
        if self.save(partial(write, str(folder)), folder, state):
            self.best = folder
            self._note_best(state)
        else:
            vars(state).update(self._noted)

    def end_with_best(self, folder: Path, model: torch.nn.Module) -> bool:
        """Put the best weights into a folder and the model, not wrapped; false where no step was chosen.

        Of an adapter, the folder's is the best and the model's is not: it is merged before it is used.
        """
        if self.best is None:
            return False
        _require_valid(self.best)
        if PartialState().is_main_process:
            shutil.copytree(self.best, folder, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        if not hasattr(model, "peft_config"):
            _load_weights(model, self.best)
        return True

    def _note_best(self, state: TrainerState) -> None:
        self._noted = {name: getattr(state, name) for name in ("best_metric", "best_global_step")}

    def _complete(self, folder: Path, state: TrainerState) -> None:
        """Let a folder count, then delete older ones and best weights that are named no more."""
        if not state.is_world_process_zero:
            return
        output_dir, is_state = folder.parent, folder.name.startswith(STATE)
        if is_state:
            # Trainer names its own checkpoint of the best step, if there is one, which may go before this one.
            state.best_model_checkpoint = self.best and str(self.best)
            state.save_to_json(str(folder / TRAINER_STATE))
        write_manifest(folder)
        if is_state:
            shutil.rmtree(output_dir / EARLIER, ignore_errors=True)
            rotate_checkpoints(str(output_dir), self._limit)
        named = {state.best_global_step}
        for checkpoint in checkpoints(output_dir):
            with suppress(OSError, ValueError, KeyError):  # one that is damaged is not resumed from
                named.add(json.loads((checkpoint / TRAINER_STATE).read_text())["best_global_step"])
        for weights in checkpoints(output_dir, WEIGHTS):
            if step_of(weights) not in named:
                shutil.rmtree(weights, ignore_errors=True)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that `save_pretrained` wrote into a folder, in one file or in several."""
    tensors = {}
    for part in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(part)
    return tensors


def _load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Give the model, not wrapped, the weights of a folder; on all processes together."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state = PartialState()
    tensors = read_weights(folder) if state.is_main_process else {}
    if is_deepspeed_zero3_enabled():
        from deepspeed import zero

        with zero.GatheredParameters([*model.parameters()], modifier_rank=0):
            if state.is_main_process:
                model.load_state_dict(tensors)
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=state.num_processes > 1)
        set_model_state_dict(model, tensors, options=options)


def _failure_anywhere(write: Callable[[], None]) -> str | None:
    failure = None
    try:
        write()
    except WRITE_ERRORS as error:
        failure = " ".join(str(error).split())
    return next(filter(None, gather_object([failure])), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
