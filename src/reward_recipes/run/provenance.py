"""What a run was made with and what it cost: versions, commit, device; pairs, tokens, seconds."""

import math
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

PACKAGES = ("reward-recipes", "torch", "transformers", "trl", "accelerate", "datasets", "peft")


def installed() -> dict[str, str]:
    """Versions of the packages that decide a run's figures; one that runs without being installed is left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def made_with(device: torch.device) -> dict[str, Any]:
    """What this process runs with. To be asked before training, because a checkout may move on meanwhile.

    Returns:
        `versions` of the packages; the source's `commit`, with a `+` unless the package's files are known to be those
        of the commit, None outside a checkout or without git; the `device` by name, a CPU with the threads it gives.
    """
    name = f"CPU, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"versions": installed(), "commit": _commit(), "device": name}


def cost(model: nn.Module, totals: Mapping[str, int], packed: bool, log: pd.DataFrame) -> dict[str, Any]:
    """What training took, over all attempts of a resumed run.

    Args:
        model: without a wrapper.
        totals: pairs trained on, repeats included, and their token counts.
        packed: whether pairs shared rows.
        log: of the run, as `evaluate.read_log` gives it.

    Returns:
        `totals`: `pairs`, their `num_tokens`, `num_unique_tokens` (each common prefix once) and `num_padded_tokens`;
        `packed`: if so, the unique tokens are computed, and what fills up the rows, else the padded ones; `seconds`
        from the start to the last step, evaluations between included, None if the log does not know; `weights` without
        the embeddings. Those of all experts count, though a token passes few; and with LoRA those of model and adapter,
        though only the adapter's get a gradient: 6 FLOPs a weight and token (Kaplan et al., 2020, section 2.1) are too
        many there.
    """
    seconds = float(log["elapsed_seconds"].max())
    return {
        **totals,
        "packed": packed,
        "seconds": None if math.isnan(seconds) else seconds,
        "weights": _weights(model),
    }


def _weights(model: nn.Module) -> int:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in tables]
    # ZeRO-3 takes parameters away, but each says how large it was; FSDP2's give their whole size.
    taken = sum(parameter.ds_numel - parameter.numel() for parameter in others if hasattr(parameter, "ds_numel"))
    return model.num_parameters(exclude_embeddings=True) + taken


def _commit() -> str | None:
    """The commit of the checkout that this package is run from."""
    file = Path(__file__)
    commit = _git(file.parent, "rev-parse", "--short=7", "HEAD")
    # A package installed into a folder of somebody's checkout is no part of that.
    if commit is None or _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return commit if changes == "" else f"{commit}+"


def _git(folder: Path, *command: str) -> str | None:
    """What git prints about a folder; None if it cannot tell."""
    git = ["git", "--no-optional-locks", "-C", str(folder)]  # somebody may be committing
    try:
        done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
