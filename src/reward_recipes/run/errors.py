"""How a user's mistake is told: one line, exit status 2, no traceback, no token of the Hub."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from reward_recipes.run.console import quiet_libraries

TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")


class UserError(Exception):
    """A mistake that the user can mend. Its text says what was expected, what was found and what to do."""


def expect(holds: bool, name: str, expected: str, found: object) -> None:
    """Raise `UserError` unless it holds, with what was `expected` of `name` and what was `found`."""
    if not holds:
        raise UserError(f"{name}: expected {expected}, found {found!r}")


def first_line(error: Exception) -> str:
    """What an exception of a library says, without the lines of advice behind it; its type where it says nothing."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    alone = said and not isinstance(error, KeyError)  # which says a name, and not that it is missing
    return said if alone else f"{type(error).__name__} {said}".strip()


def source_hint(error: BaseException | None, name: str | os.PathLike[str], option: str) -> str:
    """The way out where a source called `name` was not found: a token where the Hub refused one, else a local folder.

    The Hub's answer may be a cause of the error.
    """
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return f"; the Hub refuses access ({status}): check the name, and the token (`hf auth login`, or HF_TOKEN)"
        error = error.__cause__ or error.__context__
    return "" if os.path.exists(os.path.expanduser(name)) else f"; without hub access, point {option} at a local folder"


@contextmanager
def settings_that_fit(begun: Callable[[], bool] = bool) -> Iterator[None]:
    """Turn what libraries raise for settings, such as a package that is missing, into a `UserError` until `begun`."""
    try:
        yield
    except (ValueError, TypeError, ImportError, KeyError) as error:
        if begun():
            raise
        raise UserError(f"expected settings that fit the model, found: {first_line(error)}; mend the recipe") from error


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point; turn a `UserError`, or a file that cannot be used, into one line and exit status 2."""
    quiet_libraries()
    try:
        main()
    except BrokenPipeError:  # the reader, `head` say, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, SafetensorError) as error:
        line = " ".join(str(error).split())
        print(f"error: {TOKEN.sub('(a token)', line)}", file=sys.stderr)
        sys.exit(2)
