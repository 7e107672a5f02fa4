"""Temporary float32 for an autoencoder that overflows in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def whole(vae) -> Iterator[Any]:
    """Yields the autoencoder, in float32 inside the context if it is in half precision and its config marks that as
    overflowing (`force_upcast`, as SDXL's does). diffusers' own pipelines do the same."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        yield vae.float() if upcast else vae
    finally:
        if upcast:
            vae.half()
