"""Recipes that train reward models with TRL: exact, fast and with evidence."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_recipes.policy import RewardFunction

__version__ = "0.1.0"
__all__ = ["RewardFunction"]


def __getattr__(name: str) -> Any:
    """Import TRL and torch, which takes seconds, only for those who use them."""
    if name == "RewardFunction":
        from reward_recipes.policy import RewardFunction

        return RewardFunction
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
