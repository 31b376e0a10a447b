"""How figures look on a page: tables, percentages, intervals, points."""

from collections.abc import Sequence

UNKNOWN = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts; a bar within one is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return UNKNOWN if value is None else f"{value:.{digits}%}"


def decimals(value: float | None, digits: int = 4) -> str:
    """A number to a fixed number of digits."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def points(value: float | None) -> str:
    """A difference of two shares in percentage points, with its sign."""
    return UNKNOWN if value is None else f"{100 * value:+.1f}"


def power(value: float) -> str:
    """A large number as 2.3e16."""
    return f"{value:.1e}".replace("e+", "e")
