"""What a figure depends on, as hashes: files and the weights of networks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch


def of_file(file: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def of_module(module: torch.nn.Module) -> str:
    """The SHA-256, in hex, of every weight of a network, with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
