"""What a figure depends on, as a hash: the weights of networks."""

from __future__ import annotations

import hashlib

import torch


def of_module(module: torch.nn.Module) -> str:
    """The SHA-256, in hex, of every weight of a network, with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
