"""Resizes by name: two tools that resize differently do not measure the same distance, so a protocol names its resize.

| name | how |
|---|---|
| bilinear | bilinear with antialiasing (what torchmetrics does) |
| bicubic | bicubic with antialiasing |
| nearest | nearest neighbour |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stepdistill.errors import InputError

RESIZES = {
    "bilinear": {"mode": "bilinear", "antialias": True, "align_corners": False},
    "bicubic": {"mode": "bicubic", "antialias": True, "align_corners": False},
    "nearest": {"mode": "nearest-exact"},
}


def check_images(images: Tensor) -> Tensor:
    """The pictures, if they are uint8 (B, 3, H, W).

    Raises:
        InputError: another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images: got {images.dtype} {tuple(images.shape)}; allowed: uint8 (B, 3, H, W)")
    return images


def resize(images: Tensor, size: int, how: str) -> Tensor:
    """Pictures (B, 3, H, W), uint8, to (B, 3, size, size) float32 in [0, 255].

    Raises:
        InputError: an unknown name.
    """
    if how not in RESIZES:
        raise InputError(f"resize: got {how!r}; allowed: {', '.join(RESIZES)}")
    images = images.float()
    if images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, size=(size, size), **RESIZES[how]).clamp_(0, 255)
