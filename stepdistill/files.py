"""Atomic writes of files and folders, and detection of full disks."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepdistill.errors import InputError

FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}


def check_place(folder: Path) -> None:
    """Checks that a folder can be written to, or created, without touching it.

    Raises:
        InputError: it is a file, lies below one, or may not be written.
    """
    folder = Path(folder)
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise InputError(f"--out: got {folder} ({error.strerror}); allowed: a folder that can be written") from error
    if not nearest.is_dir():
        what = "is a file" if nearest == folder else f"is below {nearest}, a file"
        raise InputError(f"--out: got {folder}, which {what}; allowed: a folder; give another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out: got {folder}; allowed: a folder that can be written; {nearest} may not be")


def cache_folder() -> Path:
    """The folder of all caches: $STEPDISTILL_CACHE, else ~/.cache/stepdistill."""
    return Path(os.environ.get("STEPDISTILL_CACHE") or Path.home() / ".cache" / "stepdistill")


def disk_full(error: BaseException) -> bool:
    """Whether an error means a full disk or an exhausted quota; safetensors reports these only in the message."""
    return getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL.values())


def unwritable(error: BaseException) -> bool:
    """Whether an error means that nothing can be written here: a full disk, or no permission to write."""
    return disk_full(error) or (isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS))


def misplaced(error: BaseException) -> bool:
    """Whether an error means that a path cannot exist, such as one below a file."""
    wrong = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
    return isinstance(error, OSError) and error.errno in wrong


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Yields a temporary folder, which replaces `final` on exit without an error.

    Raises:
        InputError: the disk is full. The previous content of `final` is kept.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (final.with_name(f".{final.name}.{end}") for end in ("new", "old"))
    shutil.rmtree(beside, ignore_errors=True)
    _restore(old, final)  # of a process killed between the two renames
    try:
        beside.mkdir()
        yield beside
        for file in [*beside.rglob("*"), beside]:
            sync(file)
        if final.exists():
            final.rename(old)
            beside.rename(final)
            shutil.rmtree(old)
        else:
            beside.rename(final)
        sync(final.parent)
    except Exception as error:
        shutil.rmtree(beside, ignore_errors=True)
        _restore(old, final)
        if disk_full(error):
            raise InputError(
                f"disk: got no space left while writing {final}; free some and run the same command again; what was "
                "there is kept"
            ) from error
        raise


@contextmanager
def set_aside(folder: Path) -> Iterator[None]:
    """Moves a folder away, and back if there is an error or an interruption; without one it is deleted. One that a
    killed process had moved away is put back first."""
    old = folder.with_name(f".{folder.name}.aside")

    def back() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        old.rename(folder)

    if old.exists():
        back()
    if folder.exists():
        folder.rename(old)
    try:
        yield
    except BaseException:
        if old.exists():
            back()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore(old: Path, final: Path) -> None:
    """Puts a folder that was moved away back, or deletes it if its replacement is there."""
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(final)


def write(path: Path, text: str) -> None:
    """Writes a small file atomically: the previous content stays until the new one is on the disk."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.replace(path)
