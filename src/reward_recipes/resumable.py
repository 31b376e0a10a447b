"""TRL's `RewardTrainer` that goes on from a checkpoint exactly, and outlives one that cannot be written.

Private names of transformers' Trainer that are used, alike from 5.17 to 5.23: `_save_checkpoint` and the parts it
calls, `_run_epoch`, `_get_grad_norm`, and the sums `_tr_loss`, `_total_loss_scalar` and `_globalstep_last_logged`.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints
from trl import RewardTrainer

from reward_recipes.run import (
    FiniteSteps,
    Interrupted,
    LoggingWindow,
    NotFinite,
    UserError,
    find_damage,
    keep_training_if_tracker_fails,
    latest_valid,
    require_finite_weights,
    write_manifest,
)

OPEN_WINDOW = "open_window.json"
# torch tells a failed write as RuntimeError. Anything worse of that kind shows again in the next step.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class ResumableTrainer(RewardTrainer):
    """`trl.RewardTrainer` whose checkpoints are whole or do not count, and carry what is summed between two logs.

    A checkpoint that cannot be written is a warning; the next one is tried. A loss, gradient norm or weight that is
    not finite ends the run with a `UserError`, before it reaches a checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._window = LoggingWindow()
        self._resumed: Path | None = None
        self._best_saved: tuple[float | None, int | None, str | None] = (None, None, None)
        super().__init__(*args, **kwargs)
        self._finite = FiniteSteps(Path(self.args.output_dir))
        trackers = get_reporting_integration_callbacks(self.args.report_to)
        for callback in self.callback_handler.callbacks:
            if type(callback) in trackers:
                keep_training_if_tracker_fails(callback)
        self.add_callback(_GoOn(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as TRL does; `True` resumes from the newest whole checkpoint, if there is one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_valid(Path(self.args.output_dir))
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(str(self._resumed) if self._resumed else None, **kwargs)
        except UnpicklingError as error:
            raise UserError(
                f"{self._resumed}: expected tensors, found a pickle of something else, which is not read; resume "
                "from a checkpoint that this tool wrote"
            ) from error
        except (Interrupted, NotFinite):
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # so that trackers write their rest
            raise

    def go_on(self) -> None:
        """Take up what the checkpoint holds beyond Trainer's own state.

        Raises:
            UserError: the best checkpoint so far is gone or broken, so that the best model could not be had in the end;
                or the sums are those of another number of processes.
        """
        if self._resumed is None:
            return
        if self.state.best_global_step:
            best = self._resumed.parent / f"checkpoint-{self.state.best_global_step}"
            _require_whole(best)
            self.state.best_model_checkpoint = str(best)  # the folder may have been moved
        self._best_saved = self._best()
        saved = json.loads((self._resumed / OPEN_WINDOW).read_text())
        self._globalstep_last_logged = saved["last_logged"]
        if self.state.global_step > saved["last_logged"]:
            self._take_share(saved["processes"])

    def _take_share(self, processes: list[dict[str, Any]]) -> None:
        """Each process goes on with its own sums."""
        if len(processes) != self.args.world_size:
            raise UserError(
                f"expected {len(processes)} processes, as in the run that saved {self._resumed} between two logs, "
                f"found {self.args.world_size}; launch {len(processes)}"
            )
        mine = processes[self.args.process_index]
        self._tr_loss += mine["loss"]
        self._total_loss_scalar -= mine["loss"]  # it is not of the steps that this process is about to train
        self._window.restore(mine["batches"], self.args.device)

    def _load_best_model(self) -> None:
        """Trainer would keep the last model where the best one is gone."""
        _require_whole(Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train nothing where the run had come to its end: Trainer would take one more step."""
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """TRL's step, remembered until the gradient is known."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite.add(loss, inputs["row"])
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._finite.check(self.state.global_step + 1, None if self.args.fp16 else whole)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write the parts as Trainer does, then the manifest that makes them count, then delete older checkpoints."""
        require_finite_weights(self.model, self.state.global_step, Path(self.args.output_dir))
        self.store_flos()
        share = {"loss": self._tr_loss.item(), "batches": self._window.export()}
        processes = gather_object([share])
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        failure = self._attempt(self._write_tensors, folder)
        if failure is None:
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(folder)
            failure = self._attempt(self._write_state, folder, processes)
        if failure is None:
            self._best_saved = self._best()
        else:
            self._give_up(folder, failure)

    def _attempt(self, write: Callable[..., None], *args: Any) -> str | None:
        """Why writing failed on any process; None if it did not."""
        failure = None
        try:
            write(*args)
        except WRITE_ERRORS as error:
            failure = " ".join(str(error).split())
        return next(filter(None, gather_object([failure])), None)

    def _write_tensors(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))

    def _write_state(self, folder: Path, processes: list[dict[str, Any]]) -> None:
        if not self.args.should_save:
            return
        callbacks = [*self.callback_handler.callbacks, self.control]
        exportable = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        sums = {"last_logged": self._globalstep_last_logged, "processes": processes}
        (folder / OPEN_WINDOW).write_text(json.dumps(sums) + "\n")
        write_manifest(folder)
        best = self.state.best_model_checkpoint
        rotate_checkpoints(str(folder.parent), self.args.save_total_limit, best)

    def _give_up(self, folder: Path, failure: str) -> None:
        """Go on without a checkpoint; the best step is the best one that was saved."""
        self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self._best_saved
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            mend = "look at the disk's space and the folder's rights"
            warnings.warn(f"{folder} could not be written, and training goes on: {failure}; {mend}", stacklevel=2)

    def _best(self) -> tuple[float | None, int | None, str | None]:
        return self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint


def _require_whole(best: Path) -> None:
    if problem := find_damage(best):
        raise UserError(
            f"expected the best checkpoint to be whole, found {best}: {problem}; put it back and continue with "
            "--resume_from_checkpoint true, or start anew with --overwrite_output_dir true"
        )


class _GoOn(TrainerCallback):
    """Takes up a checkpoint's sums at the first moment after Trainer has set them to zero."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.go_on()
        control.should_training_stop = control.should_training_stop or state.global_step >= state.max_steps
