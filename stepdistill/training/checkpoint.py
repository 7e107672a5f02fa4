"""Checkpoints that are whole or not there: written beside, hashed, renamed; the last one stays until the next is whole.

A checkpoint is a folder `step-<update>` with `state.safetensors` (weights, averages, optimizer; there is no random
state to keep) and `state.json` (the update, and the SHA-256 of the tensors). Nothing in it is a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import InputError

KEEP = 2


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(final: Path):
    """A folder to write in; on leaving without an error it takes the place of `final` in one rename.

    Raises:
        InputError: the disk is full. What was at `final` is still there.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        for file in [*beside.rglob("*"), beside]:
            sync(file)
        if final.exists():
            old = final.with_name(f".{final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            beside.rename(final)
            shutil.rmtree(old)
        else:
            beside.rename(final)
        sync(final.parent)
    except Exception as error:
        shutil.rmtree(beside, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full:
            raise InputError(
                f"disk: got no space left while writing {final}; free some and run the same command again; what was "
                "there is kept"
            ) from error
        raise


def write(path: Path, text: str) -> None:
    """Writes a small file whole or not at all: what was there stays until the new one is on the disk."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    sync(beside)
    beside.replace(path)


def flatten(tree: object, prefix: str, tensors: dict[str, Tensor]) -> object:
    """Moves the tensors of nested dictionaries and lists into `tensors`; returns the rest with names in their place."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach().cpu().contiguous().clone()
        return {"tensor": prefix}
    if isinstance(tree, dict):
        return {"dict": [[k, flatten(v, f"{prefix}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [flatten(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]}
    return {"value": tree}


def unflatten(tree: dict, tensors: dict[str, Tensor]) -> object:
    """The inverse of `flatten`; tuples come back as lists."""
    kind, content = next(iter(tree.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: unflatten(v, tensors) for k, v in content}
    if kind == "list":
        return [unflatten(v, tensors) for v in content]
    return content


def save(folder: Path, update: int, state: dict) -> None:
    """Writes the checkpoint of an update and drops all but it and the one before.

    Args:
        state: nested dictionaries and lists of tensors and JSON values.
    """
    tensors: dict[str, Tensor] = {}
    tree = flatten(state, "s", tensors)
    with replacing(folder / f"step-{update:08d}") as path:
        save_file(tensors, path / "state.safetensors")
        record = {"update": update, "sha256": digest(path / "state.safetensors"), "tree": tree}
        (path / "state.json").write_text(json.dumps(record))
    whole = [path for path in sorted(folder.glob("step-*")) if path.name <= f"step-{update:08d}"]
    for path in folder.glob("step-*"):
        if path not in whole[-KEEP:]:  # older ones, and later ones, which were broken or the run would not be here
            shutil.rmtree(path)


def load_latest(folder: Path) -> tuple[int, dict] | None:
    """The newest whole checkpoint: its update and its state; None where there is none yet.

    A broken one is passed over with a warning.

    Raises:
        InputError: there are checkpoints and all are broken.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        try:
            record = json.loads((path / "state.json").read_text())
            if digest(path / "state.safetensors") != record["sha256"]:
                raise ValueError("its hash does not fit")
            state = unflatten(record["tree"], load_file(path / "state.safetensors"))
            return record["update"], state
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(f"checkpoint {path} is broken ({str(error)[:80]}); trying the one before", stacklevel=2)
    if found:
        raise InputError(
            f"checkpoints: got {len(found)} in {folder}, all broken; allowed: a whole one; remove the folder to start "
            "again"
        )
    return None
