"""What a run was made from: kept in every checkpoint, and compared before the run goes on from there."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from reward_recipes.run.arguments import NOT_SAVED
from reward_recipes.run.checkpoints import TRAINER_STATE
from reward_recipes.run.errors import UserError

# These fields may change if the pairs or the weights that they lead to stay the same.
JUDGED_BY = {
    "training pairs": {
        *("dataset_name", "dataset_config", "dataset_data_dirs", "dataset_train_split", "columns", "prompt_marker"),
        *("validation_fraction", "max_train_samples", "eos_token", "chat_template_path"),
    },
    "evaluated pairs": {"eval_splits", "max_eval_samples"},
    "test pairs": {"dataset_test_split"},
    "model": {"model_name_or_path", "model_revision", "model_init_kwargs"},
}
# What may change on the way, which is then said: how long, how often, and how the same figures are computed.
MAY_CHANGE = {
    *("num_train_epochs", "max_steps", "early_stopping_patience", "test pairs", "train_probe_size", "known_ceiling"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "save_state_dict", "report_to"),
    *("per_device_eval_batch_size", "pair_packing", "max_tokens_per_row", "use_cpu", "torch_compile"),
    *("torch_compile_backend", "torch_compile_mode", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading"),
}
# What changes neither log nor weights, and is not kept.
WITHOUT_INFLUENCE = {
    *("output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "push_to_hub", "hub_token", "hub_model_id"),
    *("hub_private_repo", "resume_from_checkpoint", "overwrite_output_dir", "dataset_num_proc", "trust_remote_code"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_in_order"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "skip_memory_metrics", "ddp_timeout"),
    *("local_rank", "do_train", "do_eval", "do_predict", "save_on_each_node", "torch_empty_cache_steps"),
    *("max_run_time", "load_best_model_at_end"),
}


class Lineage(TrainerCallback, ExportableState):
    """Keeps in every checkpoint what its run was made from, by name, as `made_from` gives it."""

    def __init__(self, made_from: Mapping[str, Any]) -> None:
        self.made_from = dict(made_from)

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {}, "attributes": {"made_from": self.made_from}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say by how much the learning rate jumps where a longer run stretches its schedule."""
        schedule = kwargs.get("lr_scheduler")
        if not state.global_step or not hasattr(schedule, "lr_lambdas") or not state.is_world_process_zero:
            return
        before, after = schedule.get_last_lr()[0], schedule.base_lrs[0] * schedule.lr_lambdas[0](schedule.last_epoch)
        if abs(after - before) > 1e-3 * max(before, after):
            print(f"the learning rate goes from {before:.3g} to {after:.3g} at step {state.global_step:,}")

    def checked(self, checkpoint: str | None) -> "Lineage":
        """Hold the run to the one that saved the checkpoint, and say what changes; returns itself.

        Raises `UserError`, with old and new value, for what changes the meaning of the run.
        """
        if checkpoint is None:
            return self
        saved = json.loads((Path(checkpoint) / TRAINER_STATE).read_text())["stateful_callbacks"]
        before = saved.get(type(self).__name__, {}).get("attributes", {}).get("made_from")
        if before is None:
            raise UserError(
                f"resume_from_checkpoint: expected a checkpoint of this version, found {checkpoint}, which does not "
                "say what it was made from; start anew in another output_dir"
            )
        changed = changes(before, self.made_from)
        if refused := [f"{name} ({old}, now {new})" for name, (old, new) in changed.items() if name not in MAY_CHANGE]:
            raise UserError(
                f"resume_from_checkpoint: expected the run that saved {checkpoint}, found another "
                f"{', '.join(refused)}; change it back, or start anew in another output_dir"
            )
        for name, (old, new) in changed.items():
            PartialState().print(f"the run goes on with a change of {name}: {old}, now {new}")
        return self


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Old and new value of what differs; a fingerprint that differs stands for the fields that may have changed it."""
    names = [name for name in {**before, **now} if name not in WITHOUT_INFLUENCE]  # as an earlier version may keep
    differs = {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
    for judge, judged in JUDGED_BY.items():
        fields_changed = {name: differs.pop(name) for name in judged if name in differs}
        if judge in differs and fields_changed:
            old, new = ("; ".join(f"{name}: {pair[side]}" for name, pair in fields_changed.items()) for side in (0, 1))
            differs[judge] = (old, new)
    return differs


def made_from(
    settings: Sequence[Any], model: torch.nn.Module, train: Dataset, evaluation: Iterable[Dataset], test: Dataset | None
) -> dict[str, Any]:
    """What decides a run, by name: the fields of its dataclasses, less what has no influence, and fingerprints."""
    found = {spec.name: _plain(getattr(part, spec.name)) for part in settings for spec in fields(part)}
    state = PartialState()
    return {name: value for name, value in found.items() if name not in WITHOUT_INFLUENCE} | {
        "training pairs": _hash_pairs(train),
        "evaluated pairs": _hash_pairs(*evaluation),
        "test pairs": _hash_pairs(*([test] if test else [])),
        "model": _hash_weights(model),
        "engine": state.distributed_type.value,
        "processes": state.num_processes,
    }


def _plain(value: Any) -> Any:
    """A value as JSON gives it back, without secrets."""
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if name not in NOT_SAVED}
    return json.loads(json.dumps(value, default=str))


def _hash_pairs(*parts: Dataset) -> str:
    """A hash of tokenised pairs: their rows, texts and margins, in their order."""
    digest = blake2b(digest_size=8)
    for pairs in parts:
        for name in ("row", "chosen_hash", "rejected_hash", "margin"):
            if name in pairs.column_names:
                values = numbers_of(pairs, name)
                digest.update(f"{name} {len(values)}".encode() + values.tobytes())
    return digest.hexdigest()


def numbers_of(pairs: Dataset, column: str) -> np.ndarray:
    """A column of numbers. `datasets` itself would gather the rows of a selection one by one."""
    values, rows = pairs.data.column(column).to_numpy(), pairs._indices
    return values if rows is None else values[rows.column(0).to_numpy()]


def _hash_weights(model: torch.nn.Module) -> str:
    """A hash of some 256 numbers of every weight but a new head's and an adapter's."""
    digest = blake2b(digest_size=8)
    for name, weight in model.named_parameters():
        if "score." not in name and "lora_" not in name:
            flat = weight.detach().flatten()
            sample = flat[:: max(1, len(flat) // 256)].float().cpu().numpy()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
