"""Recipes that train reward models with TRL: exact, fast and with evidence."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_recipes.early import refuse_missing_sources
from reward_recipes.shipped import answer_help

if TYPE_CHECKING:
    from reward_recipes.policy import RewardFunction

__version__ = "0.1.0"
__all__ = ["RewardFunction"]

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers report each start to Hugging Face

if sys.argv[:1] == ["-m"]:  # `python -m reward_recipes.NAME --help` is answered before NAME, and torch, are imported
    answer_help(next((word for word in sys.orig_argv if word.startswith("reward_recipes.")), ""), sys.argv)
if Path(*sys.argv[:1]).name in ("-m", "reward-recipes"):  # a command starts; its module, and torch, come next
    refuse_missing_sources(sys.argv[1:])


def __getattr__(name: str) -> Any:
    """Import TRL and torch, which takes seconds, only for those who use them."""
    if name == "RewardFunction":
        from reward_recipes.policy import RewardFunction

        return RewardFunction
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
