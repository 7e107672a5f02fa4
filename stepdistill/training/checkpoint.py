"""Atomic checkpoints: written beside, hashed, then renamed; the last one stays until the next is complete.

A checkpoint is a folder `step-<update>` with `state.safetensors` (weights, averages, optimizer; there is no random
state to keep) and `state.json` (the update, and the SHA-256 of the tensors). Neither is a pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.files import replacing, sha256

KEEP = 2


def flatten(tree: object, prefix: str, tensors: dict[str, Tensor]) -> object:
    """Moves the tensors of nested dictionaries and lists into `tensors`, those on the CPU without a copy; returns the
    rest with names in their place."""
    if isinstance(tree, Tensor):
        whole = tree.detach().cpu().contiguous()
        part = whole.untyped_storage().nbytes() > whole.nbytes  # of a tensor that another may be part of, too
        tensors[prefix] = whole.clone() if part else whole
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
    """Writes the checkpoint of an update and removes all but it and the one before.

    Args:
        state: nested dictionaries and lists of tensors and JSON values.
    """
    tensors: dict[str, Tensor] = {}
    tree = flatten(state, "s", tensors)
    with replacing(folder / f"step-{update:08d}") as path:
        save_file(tensors, path / "state.safetensors")
        record = {"update": update, "sha256": sha256(path / "state.safetensors"), "tree": tree}
        (path / "state.json").write_text(json.dumps(record))
    whole = [path for path in sorted(folder.glob("step-*")) if path.name <= f"step-{update:08d}"]
    for path in folder.glob("step-*"):
        if path not in whole[-KEEP:]:  # older ones, and later ones, which must have been broken
            shutil.rmtree(path)


def load_latest(folder: Path, say: Callable[[str], object] = print) -> tuple[int, dict] | None:
    """The newest complete checkpoint: its update and its state; None if there is none yet.

    A broken one is skipped, and reported through `say` in one line.

    Raises:
        InputError: there are checkpoints and all are broken.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    broken = (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, SafetensorError)
    for path in found:
        try:
            record = json.loads((path / "state.json").read_text())
            if sha256(path / "state.safetensors") != record["sha256"]:
                raise ValueError("its hash does not match")
            state = unflatten(record["tree"], load_file(path / "state.safetensors"))
            return record["update"], state
        except broken as error:
            reason = " ".join(str(error).split())[:80]
            say(f"checkpoint {path} is broken ({reason}); trying the previous one")
    if found:
        raise InputError(
            f"checkpoints: got {len(found)} in {folder}, all broken; allowed: a whole one; remove the folder to start "
            "again"
        )
    return None
