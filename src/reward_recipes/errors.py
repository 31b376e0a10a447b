"""How a user's mistake is told: one line, exit status 2, no traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend. Its text says what was expected, what was found and what to do."""


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point; turn a `UserError` into one line on standard error and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
