"""Resizes by name: tools that resize differently do not measure the same distance, so a protocol names its resize.

| name | method | as in |
|---|---|---|
| bilinear | bilinear, antialiased | torchmetrics |
| torch-fidelity | bilinear, corners aligned at the first pixel, not antialiased | torch-fidelity, TensorFlow 1 |
| pytorch-fid | bilinear, not antialiased | pytorch-fid, MLPerf |
| clean-fid | Pillow's bicubic on float channels, clipped | clean-fid |
| lanczos | Pillow's Lanczos on bytes | DMD2 |
| bicubic | bicubic, antialiased | |
| nearest | nearest neighbour | |
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stepdistill.errors import InputError

Resize = Callable[[Tensor, int], Tensor]


def _torch(**options) -> Resize:
    return lambda images, size: functional.interpolate(images.float(), size=(size, size), **options)


def _tensorflow1(images: Tensor, size: int) -> Tensor:
    """Interpolates output pixel i at i * in / out between its two neighbours, columns first, as TensorFlow 1 did."""
    images = images.float()
    for axis in (3, 2):
        length = images.shape[axis]
        at = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        share = (at - low).view(-1, *[1] * (3 - axis))
        below, above = images.index_select(axis, low), images.index_select(axis, high)
        images = above.sub_(below).mul_(share).add_(below)
    return images


def _pillow(one: Callable[[np.ndarray, int], np.ndarray]) -> Resize:
    """Extends a resize of one image, (H, W, 3) uint8 to (size, size, 3), to batches, in threads as Pillow allows."""

    def all_of(images: Tensor, size: int) -> Tensor:
        pictures = images.permute(0, 2, 3, 1).cpu().numpy()
        with ThreadPoolExecutor() as pool:
            resized = list(pool.map(lambda picture: one(picture, size), pictures))
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device, torch.float32)

    return all_of


def _clean(picture: np.ndarray, size: int) -> np.ndarray:
    channels = (Image.fromarray(picture[..., i].astype(np.float32)) for i in range(3))
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, -1).clip(0, 255)


def _lanczos(picture: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))


RESIZES: dict[str, Resize] = {
    "bilinear": _torch(mode="bilinear", antialias=True, align_corners=False),
    "torch-fidelity": _tensorflow1,
    "pytorch-fid": _torch(mode="bilinear", align_corners=False),
    "clean-fid": _pillow(_clean),
    "lanczos": _pillow(_lanczos),
    "bicubic": _torch(mode="bicubic", antialias=True, align_corners=False),
    "nearest": _torch(mode="nearest-exact"),
}


def check_images(images: Tensor) -> Tensor:
    """Returns the images if they are uint8 (B, 3, H, W).

    Raises:
        InputError: another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images: got {images.dtype} {tuple(images.shape)}; allowed: uint8 (B, 3, H, W)")
    return images


def check_resize(how: str) -> None:
    """Raises InputError if there is no resize of this name."""
    if how not in RESIZES:
        raise InputError(f"resize: got {how!r}; allowed: {', '.join(RESIZES)}")


def resize(images: Tensor, size: int, how: str) -> Tensor:
    """Resizes images (B, 3, H, W) uint8 to (B, 3, size, size) float32 in [0, 255].

    Raises:
        InputError: an unknown name.
    """
    check_resize(how)
    if images.shape[-2:] == (size, size):
        return images.float()
    return RESIZES[how](images, size).clamp_(0, 255)
