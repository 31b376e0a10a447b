"""What happens when a tracker (TensorBoard, Weights & Biases, ...) fails in mid-run: it warns, and training goes on."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import TrainerCallback

AT_START = ("on_init_end", "on_train_begin")  # a tracker that cannot start is a mistake to mend at once


def keep_training_if_tracker_fails(tracker: TrainerCallback) -> None:
    """Turn what a tracker's events raise, from the first step on, into warnings."""
    events = [name for name in dir(TrainerCallback) if name.startswith("on_") and name not in AT_START]
    for name in events:
        setattr(tracker, name, partial(_attempt, type(tracker).__name__, getattr(tracker, name)))


def _attempt(name: str, event: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return event(*args, **kwargs)
    except Exception as error:  # whatever a tracker may raise: it is not worth a run
        warnings.warn(f"{name} failed and training goes on: {type(error).__name__}: {error}", stacklevel=2)
