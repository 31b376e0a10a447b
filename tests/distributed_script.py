"""What one and two processes do alike. Run by `test_distributed.py` in itself and, on two processes, by torchrun."""

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from toys import (
    NINE,
    SEVEN,
    TurnRound,
    config,
    corner_pairs,
    dataset,
    pairs_judged,
    random_pairs,
    text_score,
    tiny_model,
    tiny_trainer,
)

from reward_recipes.packing.support import choose_packing

LAYOUTS: dict[str, dict[str, float]] = {
    "plain": {},
    "packed": {"max_tokens_per_row": 48},
    "one row": {"max_tokens_per_row": math.inf},
}
GLOBAL_BATCH = 8


def evaluations(folder: Path) -> dict[str, dict[str, float]]:
    """Figures of 7, 1 and 9 pairs at batch 4, each with a side set of 3."""
    model = tiny_model("gpt2")
    side = {"test": dataset(pairs_judged(model, [True, True, False], seed=1))}
    figures = {}
    for layout, packed in LAYOUTS.items():
        for right in (SEVEN, [True], NINE):
            args = config(folder, per_device_eval_batch_size=4)
            pairs = pairs_judged(model, right)
            trainer = tiny_trainer(model, args, corner_pairs(), pairs, side_datasets=side, **packed)
            names = ("eval_accuracy", "eval_loss", "eval_pairs", "eval_test_accuracy", "eval_test_pairs")
            found = trainer.evaluate()
            figures[f"{layout} {len(right)}"] = {name: found[name] for name in names}
    return figures


def best_model(folder: Path) -> dict[str, float]:
    """5/9 at step 1, 4/9 at step 2; the mean of batch means would choose step 2."""
    model = tiny_model("gpt2")
    args = config(folder, eval_strategy="steps", max_steps=2, learning_rate=0.0, per_device_eval_batch_size=4)
    trainer = tiny_trainer(
        model, args, random_pairs(32), pairs_judged(model, NINE), callbacks=[TurnRound()], max_tokens_per_row=64
    )
    trainer.train()
    trainer.end_with_best(folder / "best")
    return {
        "metric": trainer.state.best_metric,
        "step": trainer.state.best_global_step,
        "again": trainer.evaluate()["eval_accuracy"],
        "score": text_score(trainer.model, [5, 6, 7, 0]),
    }


def trainings(folder: Path) -> dict[str, dict[str, Any]]:
    """Three SGD steps of 8 pairs in all: weights, the last log, and this process's rows in each micro-batch."""
    runs = {}
    for name, layout, fields in (
        ("plain", "plain", {}),
        ("packed", "packed", {}),
        ("one row, accumulated", "one row", {"gradient_accumulation_steps": 2}),
        ("one row, checkpointed", "one row", {"gradient_checkpointing": True}),
    ):
        share = GLOBAL_BATCH // PartialState().num_processes // fields.get("gradient_accumulation_steps", 1)
        args = config(folder, max_steps=3, optim="sgd", learning_rate=0.1, per_device_train_batch_size=share, **fields)
        trainer = tiny_trainer(tiny_model("gpt2"), args, random_pairs(24, longest=40), **LAYOUTS[layout])
        rows: list[int] = []
        trainer.data_collator = _counting_rows(trainer.data_collator, rows)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        weights = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
        runs[name] = {"weights": weights, "log": logs[-1], "rows": rows}
    return runs


def _counting_rows(collate: Callable[[Any], dict[str, torch.Tensor]], rows: list[int]) -> Callable[[Any], Any]:
    def counted(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        rows.append(len(batch["input_ids"]))
        return batch

    return counted


def choices() -> list[bool]:
    """Whether to pack a causal model, and one that only a look at its scores tells apart."""
    models = (tiny_model("llama"), tiny_model("llama", is_causal=False))
    with warnings.catch_warnings(action="ignore"):
        return [choose_packing("auto", model, dataset(random_pairs(9)), 64, 48) for model in models]


def main(folder: Path) -> None:
    """Do all of it as one of several processes; each leaves its tensors, the first one also the figures."""
    state = PartialState(cpu=True)
    setting = {
        "processes": state.num_processes,
        "type": state.distributed_type.value,
        "backend": torch.distributed.get_backend(),
    }
    figures = {"setting": setting, "evaluations": evaluations(folder / "a"), "best": best_model(folder / "b")}
    tensors = {"trainings": trainings(folder / "c"), "choices": choices()}
    torch.save(tensors, folder / f"{state.process_index}.pt")
    if state.is_main_process:
        (folder / "figures.json").write_text(json.dumps(figures))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
