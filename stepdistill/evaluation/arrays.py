"""Arrays kept in a file with a hash of their bytes.

    arrays.save(file, {"mean": mean}, count="20000")
    tensors, facts = arrays.load(file)

A damaged file is known for what it is, and what it held is made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.errors import InputError

HASH = "sha256"


def save(file: str | Path, tensors: Mapping[str, Tensor], **facts: str) -> None:
    """Writes a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")  # two benchmarks may make the same
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, partial, metadata=facts | {HASH: _hash(tensors)})
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what `save` wrote: the tensors, and the facts. A file without a hash is taken as it is.

    Raises:
        InputError: the file is damaged, or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as saved:
            facts = dict(saved.metadata() or {})
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118, it is no mapping
        if facts.get(HASH, own := _hash(tensors)) != own:
            raise ValueError("its hash is another")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"arrays: got {file}, which is damaged ({error}); allowed: a whole file of stepdistill's; delete it"
        ) from error
    return tensors, facts


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
