"""Float32 without TF32, which rounds the inputs of a GPU's convolutions and matrix products to 11 significant bits.

PyTorch allows it in convolutions by default. Features computed with it are not those of a CPU, nor of statistics that
were computed on one, such as those that ship.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CONVOLUTIONS, _PRODUCTS = torch.backends.cudnn, torch.backends.cuda.matmul
# (module, flag, the value without TF32); since PyTorch 2.9 the boolean flags are deprecated
FLAGS = (
    ((_CONVOLUTIONS.conv, "fp32_precision", "ieee"), (_PRODUCTS, "fp32_precision", "ieee"))
    if hasattr(_CONVOLUTIONS, "conv")
    else ((_CONVOLUTIONS, "allow_tf32", False), (_PRODUCTS, "allow_tf32", False))
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Context, or decorator of a function, in which nothing is computed with TF32; the flags are restored after it."""
    before = [getattr(module, flag) for module, flag, _ in FLAGS]
    for module, flag, off in FLAGS:
        setattr(module, flag, off)
    try:
        yield
    finally:
        for (module, flag, _), value in zip(FLAGS, before, strict=True):
            setattr(module, flag, value)
