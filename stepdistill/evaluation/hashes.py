"""Hashes of what a figure depends on: the weights of networks."""

from __future__ import annotations

import hashlib

import torch


def of_module(module: torch.nn.Module) -> str:
    """Returns the SHA-256, in hex, of all entries of a network's state_dict, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
