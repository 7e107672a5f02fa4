"""Memory savings in training: a frozen teacher's weights in half precision, and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stepdistill.errors import InputError
from stepdistill.training.processes import HALF


@contextmanager
def halved(network: nn.Module | None, precision: str) -> Iterator[None]:
    """Context in which a frozen network's matrices and kernels have the dtype that autocast would cast them to in every
    forward; afterwards they are restored bit-identically. Vectors and embeddings, which autocast leaves alone, stay.

    Args:
        network: its float32 weights are kept on the CPU meanwhile. precision: no, fp16 or bf16.
    """
    dtype = HALF[precision]
    if network is None or dtype is None:
        yield
        return
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    kept = [
        (p, p.data.cpu())
        for p in network.parameters()
        if p.ndim > 1 and p.dtype == torch.float32 and id(p) not in embeddings
    ]
    for p, _ in kept:
        p.data = p.data.to(dtype)
    try:
        yield
    finally:
        for p, whole in kept:
            p.data = whole.to(p.device)


@contextmanager
def as_in_training(network: nn.Module, precision: str) -> Iterator[None]:
    """Context in which a frozen network generates in the precision in which it teaches: `halved`, under autocast."""
    dtype, device = HALF[precision], next(network.parameters()).device
    with halved(network, precision), torch.autocast(device.type, dtype, dtype is not None):
        yield


def recomputes(network: nn.Module) -> bool:
    """Whether a network, or one within it, supports gradient checkpointing."""
    return _switch(network) is not None


def recompute(network: nn.Module) -> None:
    """Enables gradient checkpointing in a network that is trained.

    Raises:
        InputError: neither the network nor one within it supports it.
    """
    switch = _switch(network)
    if switch is None:
        raise InputError(f"gradient_checkpointing: got it for a {type(network).__name__}, which cannot; leave it out")
    switch()


def _switch(network: nn.Module):
    for module in network.modules():
        if hasattr(module, "enable_gradient_checkpointing"):  # of diffusers
            return partial(module.enable_gradient_checkpointing, partial(checkpoint, use_reentrant=False))
        if getattr(module, "supports_gradient_checkpointing", False):  # of transformers
            return partial(module.gradient_checkpointing_enable, {"use_reentrant": False})
    return None
