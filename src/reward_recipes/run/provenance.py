"""What a run was made with and what it cost: versions, commit, device; pairs, tokens, seconds."""

import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

PACKAGES = ("reward-recipes", "torch", "transformers", "trl", "accelerate", "datasets", "peft")


def made_with(device: torch.device) -> dict[str, Any]:
    """What this process runs with: `versions` of the packages, the source's `commit`, the `device` by name.

    The commit has a `+` unless the package's files are known to be its own. It is None outside a checkout, without git.
    """
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # this one may run without being installed
            versions[package] = version(package)
    name = f"CPU, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"versions": versions, "commit": _commit(), "device": name}


def cost(model: PreTrainedModel, totals: Mapping[str, int], packed: bool, log: pd.DataFrame) -> dict[str, Any]:
    """What training took, over all attempts of a resumed run.

    Beside `totals`: `packed`, whether training shared prompts; `seconds` from the start to the last step, evaluations
    included; `weights`, all parameters but embeddings (under ZeRO-3 only those of this process).
    """
    weights = model.num_parameters(exclude_embeddings=True)
    return {**totals, "packed": packed, "seconds": float(log["elapsed_seconds"].max()), "weights": weights}


def _commit() -> str | None:
    # A package installed into a folder of somebody's checkout is no part of that.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    clean = _git("diff", "--quiet", "HEAD", "--", ".") is not None
    return f"{_git('rev-parse', '--short=7', 'HEAD')}{'' if clean else '+'}"


def _git(*command: str) -> str | None:
    """What git prints in this package's folder; None if it cannot tell."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]  # somebody may be committing
    try:
        done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
