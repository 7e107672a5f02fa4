"""Locks on folders that processes write to: a running one holds its own; what a killed one left is free to be cleared.

A hold is a shared lock on the folder itself (flock): it follows the folder if that is renamed, and ends with the
process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepdistill.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def hold(folder: Path) -> int | None:
    """Creates a folder if necessary, and holds it until `release`. Returns the handle; None on Windows.

    Raises:
        OSError: the folder cannot be created.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        if _is(handle, folder):
            return handle
        os.close(handle)  # the folder was cleared before it was locked


def release(handle: int | None) -> None:
    """Releases a folder."""
    if handle is not None:
        os.close(handle)


@contextmanager
def alone(folder: Path) -> Iterator[bool | None]:
    """Yields whether no process, this one included, holds a folder; if so, none can until exit. Yields None if this is
    unknown because the file system has no such locks."""
    handle, free = None, None
    try:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = _is(handle, folder)
    except BlockingIOError:
        free = False
    except OSError:
        free = None
    try:
        yield free
    finally:
        release(handle)


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Context in which no other process can claim the same folder, which must exist.

    Raises:
        InputError: another process has claimed it.
    """
    with alone(Path(folder)) as free:
        if free is False:
            raise InputError(
                f"--out: got {folder}, which another process is writing to; allowed: one at a time; wait for it, or "
                "give another"
            )
        yield


def _is(handle: int, folder: Path) -> bool:
    """Whether the opened folder is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except FileNotFoundError:
        return False
