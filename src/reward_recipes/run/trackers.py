"""What happens when a tracker (TensorBoard, Weights & Biases, ...) fails during training: a warning."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

AT_START = ("on_init_end", "on_train_begin")  # a tracker that cannot start is a mistake to mend at once


def keep_training_if_trackers_fail(callbacks: Iterable[TrainerCallback], report_to: list[str]) -> None:
    """Turn what the callbacks of the trackers in `report_to` raise, from the first step on, into warnings."""
    trackers = get_reporting_integration_callbacks(report_to)
    events = [name for name in dir(TrainerCallback) if name.startswith("on_") and name not in AT_START]
    for callback in callbacks:
        if type(callback) in trackers:
            for name in events:
                setattr(callback, name, partial(_warn_if_it_fails, type(callback).__name__, getattr(callback, name)))


def _warn_if_it_fails(name: str, event: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return event(*args, **kwargs)
    except Exception as error:  # a tracker may raise anything
        warnings.warn(f"{name} failed and training goes on: {type(error).__name__}: {error}", stacklevel=2)
