"""Arrays in a safetensors file with a hash of their bytes.

    arrays.save(file, {"mean": mean}, count="20000")
    tensors, facts = arrays.load(file)

The hash reveals a damaged file, so that callers can compute its contents again.
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
    """Writes tensors, and facts as metadata, to a safetensors file, atomically."""
    from safetensors.torch import save_file

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")  # two benchmarks may write the same file
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, partial, metadata=facts | {HASH: _hash(tensors)})
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and facts that `save` wrote. A file without a hash is not verified.

    Raises:
        InputError: the file is damaged, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as saved:
            facts = dict(saved.metadata() or {})
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118, not a mapping
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
