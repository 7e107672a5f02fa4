"""An autoencoder that half precision overflows, for the while in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def whole(vae) -> Iterator[Any]:
    """The autoencoder; within in float32 where it is in half and its config says that this overflows (`force_upcast`:
    SDXL's), as diffusers' own pipelines do."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        yield vae.float() if upcast else vae
    finally:
        if upcast:
            vae.half()
