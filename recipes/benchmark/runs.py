"""How long whole runs take beside stock TRL: two recipes, scaled down, from launch to last file."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset

from reward_recipes.evaluate import table

RECIPES = Path(__file__).resolve().parents[1] / "gpt2-small/hh-rlhf"
STOCK, OURS, BEST = "stock", "ours", "stock, best eval batch"
PHASES = ("start-up and rest", "data", "training", "evaluation", "saving", "pictures")
BACKWARD = 3  # forward passes that a forward and a backward pass take
PROBE_SHARE = 512 / 16_592  # of the scored pairs, those from training, at full size


@dataclass(frozen=True)
class Scale:
    """A recipe's size in the benchmark, fixed before anything was measured.

    Attributes:
        pairs: that are trained on once.
        evaluations: each with a checkpoint, as in the recipe.
        scored: pairs scored in evaluations per pair trained on, as at full size.
    """

    pairs: int
    evaluations: int
    scored: float

    @property
    def probe(self) -> int:
        """Training pairs scored at each evaluation."""
        return max(1, round(self.scored * self.pairs / self.evaluations * PROBE_SHARE))

    @property
    def held_out(self) -> int:
        """Held-out pairs scored at each evaluation."""
        return round(self.scored * self.pairs / self.evaluations) - self.probe


SCALES = {"findings": Scale(160, 4, 8.0), "one_epoch": Scale(192, 2, 2.2)}


def scaled_recipe(name: str, scale: Scale, **options: Any) -> dict[str, Any]:
    """The recipe with its own batches, rates and dropout, at the size of `scale`, and with `options`."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    evaluate_every = max(1, scale.pairs // recipe["per_device_train_batch_size"] // scale.evaluations)
    log_every = max(1, recipe["logging_steps"] * evaluate_every // recipe["eval_steps"])
    for field in ("dataset_data_dirs", "validation_fraction"):
        del recipe[field]
    recipe |= {"num_train_epochs": 1, "eval_steps": evaluate_every, "logging_steps": log_every}
    return recipe | {"train_probe_size": scale.probe, "report_to": "none"} | options


def write_pairs(texts: Dataset, scale: Scale, folder: Path) -> None:
    """The first pairs for training, the next ones held out."""
    ends = {"train": (0, scale.pairs), "validation": (scale.pairs, scale.pairs + scale.held_out)}
    for split, (start, end) in ends.items():
        texts.select(range(start, end)).to_json(folder / f"{split}.jsonl")


def run_once(side: str, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One process: its `seconds` from launch to end, its `phases` in seconds, its `losses`; of ours its `cost`."""
    output_dir, path = folder / "run", folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output_dir": str(output_dir)}))
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    launched = time.time()
    command = [sys.executable, str(Path(__file__).with_name("timed_run.py")), side, str(path), str(launched)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.time() - launched
    if done.returncode:
        raise RuntimeError(f"{side} ended with status {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads((output_dir / "timed_run.json").read_text()) | {"seconds": seconds}
    if side == OURS:
        found["cost"] = json.loads((output_dir / "run_summary.json").read_text())["cost"]
    return found


def count_tokens(pairs: Dataset, scale: Scale, recipe: dict[str, Any], cost: dict[str, Any]) -> dict[str, float]:
    """Token passes of each side, a training token counting `BACKWARD` times, and their ratio, the `bound`."""
    lengths = np.array([pairs["chosen_length"], pairs["rejected_length"]])
    scored = [*range(scale.pairs, scale.pairs + scale.held_out), *range(scale.probe)]
    batch = recipe["per_device_eval_batch_size"]
    batches = [scored[start : start + batch] for start in range(0, len(scored), batch)]
    padded = sum(2 * len(rows) * int(lengths[:, rows].max()) for rows in batches)
    unique = int(lengths[:, scored].sum() - np.array(pairs["prefix"])[scored].sum())
    trained = cost["num_unique_tokens" if recipe.get("disable_dropout", True) else "num_tokens"]
    stock = BACKWARD * cost["num_padded_tokens"] + scale.evaluations * padded
    ours = BACKWARD * trained + scale.evaluations * unique
    return {STOCK: stock, OURS: ours, "bound": stock / ours}


def compare_runs(
    name: str, scale: Scale, repeats: int, best_eval_batch: int | None, pairs: Dataset, texts: Dataset, **options: Any
) -> dict[str, Any]:
    """Run both sides in turn, and stock TRL once more with the evaluation batch that suits it best.

    Args:
        name: of the recipe.
        scale: its size.
        repeats: of each side; medians are reported.
        best_eval_batch: pairs; None leaves that run out.
        pairs: tokenised, in the order of `texts`.
        texts: the pairs' `chosen` and `rejected`.
        **options: of the recipe, beside its own.
    """
    recipe = scaled_recipe(name, scale, **options)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for side in [STOCK, OURS] * repeats + [BEST] * (best_eval_batch is not None):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "pairs")
            data.mkdir()
            write_pairs(texts, scale, data)
            asked = recipe | {"dataset_name": str(data)}
            if side == BEST:
                asked |= {"per_device_eval_batch_size": best_eval_batch}
            found[side].append(run_once(OURS if side == OURS else STOCK, asked, Path(folder)))
            print(f"{name}, {side}: {found[side][-1]['seconds']:.0f} s", flush=True)
    seconds = {side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()}
    ratios = [stock["seconds"] / ours["seconds"] for stock, ours in zip(found[STOCK], found[OURS], strict=True)]
    losses = np.array([found[side][0]["losses"] for side in (STOCK, OURS)])
    return {
        "name": name,
        "recipe": {key: value for key, value in recipe.items() if key != "model_name_or_path"},
        "pairs": {"trained": scale.pairs, "scored": scale.evaluations * (scale.held_out + scale.probe)},
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_to_best": seconds[BEST] / seconds[OURS] if BEST in seconds else None,
        "tokens": count_tokens(pairs, scale, recipe, found[OURS][0]["cost"]),
        "phases": {
            side: {phase: statistics.median(run["phases"].get(phase, 0.0) for run in runs) for phase in PHASES}
            for side, runs in found.items()
        },
        "loss_difference": float(np.abs(losses[0] - losses[1]).max()),
    }


def format_runs(rows: list[dict[str, Any]], best_eval_batch: int) -> str:
    """A table of the runs, and one of where their time went, in seconds."""
    head = ["run", "stock TRL, s", "here, s", "ratio", "ratio of token passes", "largest difference of a logged loss"]
    head += [f"ratio to stock at {best_eval_batch} pairs an evaluation batch"] if best_eval_batch else []
    lines, parts = [], []
    for row in rows:
        seconds, name = row["seconds"], row["name"]
        cells = [name, f"{seconds[STOCK]:.0f}", f"{seconds[OURS]:.0f}", f"**{row['ratio']:.2f}**"]
        cells += [f"{row['tokens']['bound']:.2f}", f"{row['loss_difference']:.1e}"]
        cells += [f"{row['ratio_to_best']:.2f}"] if best_eval_batch else []
        lines.append(cells)
        for side, phases in row["phases"].items():
            parts.append([f"{name}, {side}", *(f"{phases[phase]:.1f}" for phase in PHASES)])
    return f"{table(head, lines)}\n\n{table(['run, s', *PHASES], parts)}"
