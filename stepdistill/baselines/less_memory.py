"""Less memory for a training: a frozen teacher's weights in half precision, and activations that are computed twice."""

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
    """Within, a frozen network's matrices and kernels are kept as autocast makes them in every forward; afterwards they
    are what they were, to the bit. Vectors and embeddings stay as they are: autocast computes with them as they are.

    Args:
        network: its float32 weights wait on the CPU meanwhile. precision: no, fp16 or bf16.
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


def recomputes(network: nn.Module) -> bool:
    """Whether a network, or one within it, can compute activations twice instead of keeping them."""
    return _switch(network) is not None


def recompute(network: nn.Module) -> None:
    """Has activations of a network that is trained computed twice instead of kept.

    Raises:
        InputError: it is neither of diffusers nor of transformers.
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
