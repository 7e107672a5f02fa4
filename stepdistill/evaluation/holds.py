"""Folders that processes write in: a live one holds its own; what a killed one left is held by none and can be cleared.

A hold is a shared lock on the folder itself (flock): it goes with the folder where that is renamed, and ends with the
process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def hold(folder: Path) -> int | None:
    """Makes a folder, where it is not there, and holds it until `release`.

    Raises:
        OSError: it cannot be made.
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
        os.close(handle)  # it was cleared before it was held


def release(handle: int | None) -> None:
    """Lets a folder go."""
    if handle is not None:
        os.close(handle)


@contextmanager
def alone(folder: Path) -> Iterator[bool | None]:
    """Whether no process holds a folder, this one neither; within, none can. None where that cannot be known, since
    the file system has no such locks."""
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


def _is(handle: int, folder: Path) -> bool:
    """Whether what was opened is still what lies there."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except FileNotFoundError:
        return False
