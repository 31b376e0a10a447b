"""What a run was made with and what it cost: versions, commit, device; pairs, tokens, seconds."""

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from reward_recipes.trainer import ExactRewardTrainer
from reward_recipes.window import TOKEN_COUNTS

PACKAGES = ("reward-recipes", "torch", "transformers", "trl", "accelerate", "peft")


def provenance(device: torch.device) -> dict[str, Any]:
    """`versions` of the packages; the source's `commit`, with a `+` if files differ from it, None outside a checkout;
    and the `device` by name, a CPU with the threads that it gave.
    """
    name = f"CPU, {torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"versions": {name: version(name) for name in PACKAGES}, "commit": _commit(), "device": name}


def cost(trainer: ExactRewardTrainer) -> dict[str, Any]:
    """What training took, evaluation aside unless said.

    Returns:
        `pairs` trained on, repeats included; their `num_tokens`, `num_unique_tokens` (each common prefix once) and
        `num_padded_tokens`; whether rows are `packed`, hence the unique tokens computed, or else the padded ones;
        `seconds` of the whole of training, evaluation included; `weights` that a token passes, without the embeddings.
    """
    history = trainer.state.log_history
    totals = next((entry for entry in reversed(history) if "num_tokens" in entry), {})
    seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)
    counted = {name: totals.get(name, 0) for name in ("pairs", *TOKEN_COUNTS)}
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = model.num_parameters(exclude_embeddings=True)
    return counted | {"packed": trainer.packed, "seconds": seconds, "weights": weights}


def _commit() -> str | None:
    """The commit of the checkout that this package is run from."""
    folder = Path(__file__).parent
    commit = _git(folder, "rev-parse", "--short=7", "HEAD")
    if commit is None or _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
