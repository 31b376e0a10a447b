"""TRL's `RewardTrainer` with exact figures: evaluation over all pairs, training over the whole logging window."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from reward_recipes.evaluate import compute_preference_metrics
from reward_recipes.packing import PackedCollator, PaddedCollator, ScoreTap
from reward_recipes.resumable import ResumableTrainer
from reward_recipes.run import TOKEN_COUNTS, NotFinite

PROBE = "train_probe"
BOOKKEEPING = ("row", "subset", "tokens")


class ExactRewardTrainer(ResumableTrainer):
    """`trl.RewardTrainer` whose every figure is computed from all scores, for any batch size and number of processes.

    Args:
        side_datasets: tokenised pairs evaluated along with the eval set, by name; `train_probe`, a sample of the
            training pairs, also gives `eval_overfitting_gap`.
        subsets: names that the column `subset` numbers.
        max_tokens_per_row: lay pairs out in shared rows of at most so many tokens (see `packing`, and
            `packing_support` on which models that is exact for); None pads them as TRL does.
        **kwargs: `trl.RewardTrainer`'s; data sets are tokenised pairs from `data.encode_pairs`.
    """

    def __init__(
        self,
        *args: Any,
        side_datasets: Mapping[str, Dataset] | None = None,
        subsets: Sequence[str] = (),
        max_tokens_per_row: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.side_datasets = dict(side_datasets or {})
        self.subsets = list(subsets)
        self._side_loaders: dict[str, DataLoader] = {}
        self._window_accuracy: float | None = None
        pad = kwargs["processing_class"].pad_token_id
        packed = max_tokens_per_row is not None
        collator = PackedCollator(pad, max_tokens_per_row) if packed else PaddedCollator(pad_token_id=pad)
        super().__init__(*args, data_collator=collator, compute_metrics=self._compute_metrics, **kwargs)
        self._tap = ScoreTap(self.model) if packed else None

    @property
    def packed(self) -> bool:
        """Whether pairs share rows."""
        return self._tap is not None

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Pairs come tokenised and cut; TRL would read them all once more to filter by length."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "row", "subset", "prefix"])]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss, from its own padded batch or from packed rows; the outputs hold (2n, 1) logits, chosen first.

        `label_smoothing_factor`, which TRL ignores, is the share of labels taken to be wrong: the loss is
        -(1 - share) logsigmoid(z) - share logsigmoid(-z) for the margin z, less the row's `margin` (Mitchell, "A note
        on DPO with noisy preferences", 2023, equation for cDPO). It equals -logsigmoid(z) + share z.
        """
        model_inputs = {name: value for name, value in inputs.items() if name not in BOOKKEEPING}
        scorer = model if self._tap is None else partial(self._tap.forward, model)
        loss, outputs = super().compute_loss(scorer, model_inputs, return_outputs=True)
        if share := self.args.label_smoothing_factor:
            chosen, rejected = _by_pair(outputs.logits).unbind(1)
            loss = loss + share * (chosen - rejected - inputs.get("margin", 0.0)).mean()
        if self.model.training:
            self._window.add(_by_pair(outputs.logits.detach()), inputs["tokens"])
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """(n, 2) scores and (n, 2) labels: row and subset. Without labels, `compute_metrics` would never run."""
        inputs = self._prepare_inputs(inputs)
        labels = torch.stack([inputs["row"], inputs["subset"]], dim=1)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return None, _by_pair(outputs.logits.detach()), labels

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        rows, subsets = np.asarray(prediction.label_ids).T
        # Several processes repeat pairs to fill the last batch; each pair counts once.
        rows, once = np.unique(rows, return_index=True)
        scores = np.asarray(prediction.predictions)[once]
        if not (finite := np.isfinite(scores).all(axis=1)).all():
            bad = ", ".join(map(str, rows[~finite]))
            raise NotFinite(
                f"evaluation: expected finite scores, found inf or nan, on rows {bad} of the evaluated data"
            )
        return compute_preference_metrics(scores, subsets[once], self.subsets)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Score the eval set, then the side sets, so that all figures enter one log and one choice of the best."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if metric_key_prefix != "eval":
            return output
        samples = output.num_samples
        for name in self.side_datasets:
            self.callback_handler.on_predict(self.args, self.state, self.control, {})  # closes the progress bar
            loader = self._side_loader(name)
            side = super().evaluation_loop(loader, name, prediction_loss_only, ignore_keys, f"eval_{name}")
            output.metrics.update(side.metrics)
            samples += side.num_samples
        trained = output.metrics.get(f"eval_{PROBE}_accuracy", self._window_accuracy)
        if trained is not None:
            output.metrics["eval_overfitting_gap"] = trained - output.metrics["eval_accuracy"]
        return output._replace(num_samples=samples)

    def _side_loader(self, name: str) -> DataLoader:
        """Made once, because workers may persist; not by `get_eval_dataloader`, which then gives the eval set's."""
        if name not in self._side_loaders:
            self._side_loaders[name] = self.get_test_dataloader(self.side_datasets[name])
        return self._side_loaders[name]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log exact figures in place of TRL's, which averages batch means and would overwrite ours under eval keys."""
        for figures in self._metrics.values():
            figures.clear()
        if "loss" in logs:
            logs.update(self._window_figures())
        super().log(logs, start_time)

    def _window_figures(self) -> dict[str, float]:
        figures = self._window.drain(self.accelerator.gather)
        self._window_accuracy = figures.get("accuracy")
        # Totals go on from the last log, which a checkpoint carries along.
        totals = next((entry for entry in reversed(self.state.log_history) if "num_tokens" in entry), {})
        for name in ("pairs", *TOKEN_COUNTS):
            figures[name] = figures.get(name, 0) + totals.get(name, 0)
        return figures

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Model and tokenizer only: Trainer's `training_args.bin` is a pickle that holds `hub_token` in clear text."""
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)


def _by_pair(logits: torch.Tensor) -> torch.Tensor:
    """(2n, 1) logits, chosen first, to (n, 2) scores."""
    return torch.stack(logits.squeeze(-1).chunk(2), dim=1)
