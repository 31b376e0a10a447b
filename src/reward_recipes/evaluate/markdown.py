"""How figures look on a page: tables, percentages, intervals, points."""

from collections.abc import Callable, Sequence
from textwrap import fill

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

UNKNOWN = "-"
LONGER = "always the longer text, in tokens"  # the baseline by length, named alike everywhere


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts; a bar within one is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return UNKNOWN if value is None else f"{value:.{digits}%}"


def decimals(value: float) -> str:
    """A loss, say, with four decimals."""
    return f"{value:.4f}"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}"


def span(ends: Sequence[float], show: Callable[[float], str] = percent) -> str:
    """The ends of an interval: `51.9% to 56.3%`."""
    return f"{show(ends[0])} to {show(ends[1])}"


def with_interval(value: float | None, ends: Sequence[float] | None, show: Callable[[float], str] = percent) -> str:
    """A figure and, where it has one, its interval: `54.1% (51.9% to 56.3%)`."""
    return show(value) + (f" ({span(ends, show)})" if ends else "")


def excerpt(label: str, text: str, most: int = 240, end: bool = False) -> str:
    """A label and a text, cut to `most` characters from its beginning or `end`, as lines of an indented code block."""
    text = " ".join(text.split()) or "(nothing more)"
    if len(text) > most:
        text = f"... {text[-most:].strip()}" if end else f"{text[:most].strip()} ..."
    return fill(text, 104, initial_indent=f"    {label:<8}", subsequent_indent=12 * " ")


def page(package: str, name: str) -> Template:
    """The Jinja template of a page, which stands beside a package's modules; a value that it lacks is an error.

    It may call the functions of this module.
    """
    environment = Environment(
        loader=PackageLoader(package, "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    shown_by = (percent, decimals, points, span, with_interval, excerpt)
    return environment.get_template(name, globals={show.__name__: show for show in shown_by})
