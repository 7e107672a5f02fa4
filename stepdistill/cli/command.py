"""Shared by all commands: flags from a frozen dataclass; invalid input ends in one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from stepdistill.errors import InputError

T = TypeVar("T")


def guard(command: Callable[[], int | None]) -> int:
    """Runs a command; returns its exit code.

    2, with one line on stderr, for an InputError, a full or unwritable disk, a path that cannot exist, and a GPU that
    is too small; 130 for Ctrl-C.
    """
    try:
        return command() or 0
    except InputError as error:
        return _refuse(error)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command resumes a training or a benchmark where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        from stepdistill.files import disk_full, misplaced, unwritable

        if _no_memory(error):
            summary = str(error).partition(". ")[0] or "none left"
            return _refuse(f"memory: got {summary}; allowed: what fits; lower --batch or --batch-size, or use bf16")
        if not (unwritable(error) or misplaced(error)):
            raise
        place = getattr(error, "filename", None)
        if disk_full(error):
            where = f" while writing {place}" if place else ""
            return _refuse(f"disk: got no space left{where}; free some and run the same command again")
        what = f"{place} ({error.strerror}); allowed: a place that can be read and written"
        return _refuse(f"file: got {what}; choose another" + (", or fix its permissions" * unwritable(error)))


def _no_memory(error: Exception) -> bool:
    """Whether there is too little memory, of a GPU or of the machine, for which torch raises a RuntimeError."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _refuse(why: object) -> int:
    print(f"error: {' '.join(str(why).split())}", file=sys.stderr)
    return 2


def parse(
    config: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None,
    default: T | None = None,
) -> T:  # fmt: skip
    """Parses flags into a `config`; unset ones come from `default` if it is given. --help prints and exits 0.

    Raises:
        InputError: an unknown flag, or a value of the wrong type, in one line.
    """
    import tyro

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            args = None if argv is None else list(argv)
            return tyro.cli(config, args=args, prog=prog, description=description, default=default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(printed.getvalue(), prog or sys.argv[0])) from None


def _one_line(box: str, prog: str) -> str:
    """Returns tyro's framed message without its frame, title and pointer to the help."""
    inside = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        text = line.strip("│ ").strip()
        if not text or set(line) <= set("╭╮╰╯─ ") or line.startswith("╭") or set(text) == {"─"}:
            continue
        if "helptext" in text:
            continue
        inside.append(text)
    message = " ".join(" ".join(inside).split()) or "flags could not be read"
    return f"{message}; see {prog} --help"
