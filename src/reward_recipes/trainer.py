"""TRL's `RewardTrainer` made exact: figures over all pairs, no step on bad numbers, checkpoints that resume exactly."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput
from trl import RewardTrainer

from reward_recipes.evaluate import compute_preference_metrics
from reward_recipes.packing import EvalBatches, ScoreTap, training_collator
from reward_recipes.pairs import save_tokenizer
from reward_recipes.run import (
    WRITE_ERRORS,
    CheckpointKeeper,
    FiniteSteps,
    LoggingWindow,
    NotFinite,
    UserError,
    checkpoint_at,
    fit_engine,
    keep_training_if_trackers_fail,
    require_finite_scores,
    require_sound_weights,
)

PROBE = "train_probe"
BOOKKEEPING = ("row", "subset", "tokens")  # of a batch, beside what the model reads


class ExactRewardTrainer(RewardTrainer):
    """`trl.RewardTrainer` whose every figure is computed from all scores, for any batch size and number of processes.

    A checkpoint that cannot be written is a warning; one that was written resumes the run exactly, inside a logging
    window too. The private names of transformers and TRL that this takes are listed in `tests/test_private_names.py`.

    Args:
        side_datasets: tokenised pairs evaluated along with the eval set, by name. With `train_probe`, a sample of the
            training pairs, `eval_overfitting_gap` uses its accuracy; else that of the log's last row.
        subsets: names that the column `subset` numbers.
        max_tokens_per_row: of packed rows, which evaluation always has; inf: one a batch; None pads as TRL does.
        layout: of the training pairs, as `packing.choose_packing` says.
        **kwargs: `trl.RewardTrainer`'s; data sets are tokenised pairs from `pairs.encode_splits`.
    """

    def __init__(
        self,
        *,
        args: Any,
        processing_class: Any,
        side_datasets: Mapping[str, Dataset] | None = None,
        subsets: Sequence[str] = (),
        max_tokens_per_row: float | None = None,
        layout: str = "shared",
        **kwargs: Any,
    ) -> None:
        self.side_datasets = dict(side_datasets or {})
        self.subsets = list(subsets)
        packs, pad = max_tokens_per_row is not None, processing_class.pad_token_id
        self.packed, self.max_tokens_per_row = packs and layout == "shared", max_tokens_per_row
        self._side_loaders: dict[str, DataLoader] = {}
        self._write_error: BaseException | None = None
        self._in_checkpoint = False
        self.current_gradient_accumulation_steps = 1  # until training sets it
        collator = training_collator(layout if packs else "padded", pad, max_tokens_per_row)
        args.remove_unused_columns = False  # the collators use columns that no model takes
        max_length, args.max_length = args.max_length, None  # all pairs fit; TRL would read them once more to filter
        super().__init__(args=args, processing_class=processing_class, data_collator=collator, **kwargs)
        args.max_length = max_length
        self.can_return_loss = False  # in evaluation, where TRL's loss would gather figures that nothing reads
        fit_engine(self.accelerator)
        self._tap = ScoreTap(self.model, max_tokens_per_row) if packs else None
        self._window = LoggingWindow()
        self._finite = FiniteSteps(Path(args.output_dir))
        self._keeper = CheckpointKeeper(args.save_total_limit)
        args.save_total_limit = None  # Trainer would delete an older checkpoint before the new one counts
        self.add_callback(self._window)
        self.add_callback(self._keeper)
        keep_training_if_trackers_fail(self.callback_handler.callbacks, args.report_to)

    @property
    def totals(self) -> dict[str, int]:
        """Pairs trained on up to the last row of the log, repeats included, and their token counts."""
        return dict(self._window.totals)

    def score_with(self, model: nn.Module) -> None:
        """From now on predict with another model, such as the one that was merged and saved."""
        self.model = self.model_wrapped = model.to(self.args.device)
        self._tap = ScoreTap(model, self.max_tokens_per_row) if self._tap else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss in training, from its padded batch or from packed rows, with (2n, 1) logits, chosen first.

        `label_smoothing_factor`, which TRL ignores, is the share of labels taken to be wrong: the loss is
        -(1 - share) logsigmoid(z) - share logsigmoid(-z), where z is chosen - rejected - the row's `margin` (Mitchell,
        "A note on DPO with noisy preferences", 2023, equation for cDPO). It equals -logsigmoid(z) + share z.
        """
        given = {name: value for name, value in inputs.items() if name not in BOOKKEEPING}
        with self._tap.reading(given) if "score_index" in given else nullcontext(given) as model_inputs:
            loss, outputs = super().compute_loss(model, model_inputs, return_outputs=True)
        if share := self.args.label_smoothing_factor:
            chosen, rejected = _by_pair(outputs.logits).unbind(1)
            loss = loss + share * (chosen - rejected - inputs.get("margin", 0.0)).mean()
        if num_items_in_batch is not None:  # Trainer weighs micro-batches alike, however many pairs they hold
            loss = loss * (self.current_gradient_accumulation_steps * len(inputs["row"]) / num_items_in_batch)
        self._finite.add(loss, inputs["row"])
        share_of_step = loss / self.current_gradient_accumulation_steps
        self._window.add(share_of_step, _by_pair(outputs.logits), inputs["tokens"])
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        return self._in_batches(super().get_eval_dataloader, eval_dataset or self.eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return self._in_batches(super().get_test_dataloader, test_dataset)

    def _in_batches(self, make: Callable[[Any], DataLoader], pairs: Dataset) -> DataLoader:
        """A loader of `packing.EvalBatches`, which are made by length and number of tokens."""
        collator, args, most = self.data_collator, self.args, self.args.per_device_eval_batch_size
        pad, limit = self.processing_class.pad_token_id, self.max_tokens_per_row
        self.data_collator, args.per_device_eval_batch_size = EvalBatches.collate, 1
        try:
            return make(EvalBatches(pairs, pad, args.device, most, limit))
        finally:
            self.data_collator, args.per_device_eval_batch_size = collator, most

    def prediction_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """The (1, n, 2) scores, chosen first, of a batch of n pairs."""
        with self._tap.reading(inputs) if "score_index" in inputs else nullcontext(inputs) as given:
            _, logits, _ = super().prediction_step(model, given | {"use_cache": False}, *args, **kwargs)
        return None, logits.view(1, -1, 2), None

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Score a data set; after the eval set also the side sets, so that all figures enter one log.

        Raises `NotFinite`, with the rows, if a score is not finite.
        """
        kwargs |= {"prediction_loss_only": False, "metric_key_prefix": metric_key_prefix}
        output = super().evaluation_loop(dataloader, description, **kwargs)
        scores = dataloader.dataset.in_order(output.predictions)
        output = output._replace(predictions=scores, num_samples=len(scores))
        columns = dataloader.dataset.pairs.select_columns(["row", "subset"]).with_format("numpy")[:]
        require_finite_scores(scores, columns["row"])
        figures = compute_preference_metrics(scores, columns["subset"], self.subsets)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        if metric_key_prefix != "eval":
            return output
        if not self._side_loaders:  # made once, because workers may persist; Trainer keeps only the eval set's loader
            self._side_loaders = {name: self.get_test_dataloader(data) for name, data in self.side_datasets.items()}
        for name, loader in self._side_loaders.items():
            side = self.evaluation_loop(loader, name, metric_key_prefix=f"eval_{name}")
            output.metrics.update(side.metrics)
            output = output._replace(num_samples=output.num_samples + side.num_samples)
        trained = output.metrics.get(f"eval_{PROBE}_accuracy", self._window.accuracy)
        if trained is not None:
            output.metrics["eval_overfitting_gap"] = trained - output.metrics["eval_accuracy"]
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log exact figures in place of TRL's, which averages batch means and would overwrite ours under eval keys."""
        for figures in self._metrics.values():
            figures.clear()
        if "loss" in logs:
            logs.update(self._window.drain(self.state.global_step, self.accelerator.gather))
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as TRL does; a resumed run skips `eval_on_start`."""
        self.args.eval_on_start = self.args.eval_on_start and not resume_from_checkpoint
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        except UnpicklingError as error:
            raise UserError(
                f"{resume_from_checkpoint}: expected tensors, found a pickle of something else, which is not read; "
                "resume from a checkpoint that this tool wrote"
            ) from error
        except NotFinite:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # so that trackers write their rest
            raise

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], float | None]:
        """The micro-batches of a step, and the mean number of pairs per process.

        A run that had come to its end and is resumed gets no batches: Trainer would take one more step.
        """
        if self.control.should_training_stop:
            return [], None
        batches, _ = super().get_batch_samples(*args)
        pairs = float(sum(len(batch["row"]) for batch in batches))
        if batches and self.accelerator.num_processes > 1:
            pairs = self.accelerator.gather(torch.tensor([pairs], device=self.args.device)).mean().item()
        return batches, pairs or None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._finite.check(self.state.global_step + 1, None if self.args.fp16 else whole)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Save Trainer's checkpoint with the open logging window. It counts once its manifest is written."""
        require_sound_weights(self.model, self.state.global_step, Path(self.args.output_dir))
        self._window.collect()
        # Trainer looks each callback up among those of the run that is resumed, which may have had fewer.
        callbacks = [*self.callback_handler.callbacks, self.control]
        exportable = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        checkpoint = checkpoint_at(self.state.global_step, Path(self.args.output_dir))
        self._keeper.save(partial(self._write_checkpoint, model, trial), checkpoint, self.state)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._write_error, self._in_checkpoint = None, True
        try:
            super()._save_checkpoint(model, trial)
        except WRITE_ERRORS as error:
            self._write_error = self._write_error or error  # the first one is the cause of others
        finally:
            self._in_checkpoint = False
        if self._write_error is not None:
            raise self._write_error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Model and tokenizer only: Trainer's `training_args.bin` is a pickle that holds `hub_token` in clear text."""
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        try:
            model.save_pretrained(output_dir, state_dict=state_dict)
            save_tokenizer(self.processing_class, output_dir, self.args.max_length)
        except WRITE_ERRORS as error:
            if not self._in_checkpoint:
                raise
            self._write_error = error  # raised once this process has met the others at Trainer's barrier

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any = None) -> bool:
        """Trainer's; the weights of a new best step are saved at once, and it is the best only if they could be."""
        improved = super()._determine_best_metric(metrics, trial)
        if improved:
            require_sound_weights(self.model, self.state.global_step, Path(self.args.output_dir))
            self._keeper.save_best(self.save_model, Path(self.args.output_dir), self.state)
        return improved

    def end_with_best(self, folder: Path) -> None:
        """Put the best model into a folder and predict with it, or the last one where no step was chosen."""
        if not self._keeper.end_with_best(folder, self.model):
            self.save_model(str(folder))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No draft card in checkpoints; `push` writes one from what the run measured."""


def _by_pair(logits: torch.Tensor) -> torch.Tensor:
    """(2n, 1) logits, chosen first, to (n, 2) scores."""
    return torch.stack(logits.squeeze(-1).chunk(2), dim=1)
