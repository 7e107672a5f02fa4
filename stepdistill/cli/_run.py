"""What every command shares: bad input ends in one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from stepdistill.errors import InputError


def guard(command: Callable[[], int | None]) -> int:
    """Runs a command; returns its exit code, 2 with one line on stderr for an InputError, 130 for Ctrl-C."""
    try:
        return command() or 0
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes where it stopped", file=sys.stderr)
        return 130
