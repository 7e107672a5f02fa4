"""Framing: a protocol brings every image, real or generated, to the same size in the same way.

    frame = Frame(256, "square", "lanczos")       # DMD2's, for COCO
    frame(picture)                                # a PIL image
    frame.batch(pictures)                         # uint8 (B, 3, H, W) -> (B, 3, 256, 256)

It precedes the extractor's own resize: images of 512 pixels that are measured at 256 go through both.

| fit | how |
|---|---|
| cover | the shorter side to `size`, then the centre (torchvision's Resize and CenterCrop: SANA on MJHQ) |
| square | the largest centred square, then to `size` (DMD2 on COCO) |
| crop | the centre, without a resize (DMD2's patches); an image too small for it is resized to `size` whole |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from stepdistill.errors import InputError
from stepdistill.evaluation.resize import check_images

FITS = ("cover", "square", "crop")
FILTERS = {name: InterpolationMode[name.upper()] for name in ("lanczos", "bicubic", "bilinear")}


@dataclass(frozen=True)
class Frame:
    """Brings images to `size` pixels a side.

    Attributes:
        fit: one of FITS. filter: a Pillow filter, one of FILTERS.

    Raises:
        InputError: the fit, filter or size is not allowed.
    """

    size: int
    fit: str = "square"
    filter: str = "lanczos"

    def __post_init__(self) -> None:
        for name, value, allowed in (("fit", self.fit, FITS), ("filter", self.filter, FILTERS)):
            if value not in allowed:
                raise InputError(f"frame {name}: got {value!r}; allowed: {', '.join(allowed)}")
        if not isinstance(self.size, int) or self.size < 1:
            raise InputError(f"frame size: got {self.size!r}; allowed: 1 or more pixels")

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Returns an RGB image in this frame."""
        short, whole = min(picture.size), [self.size, self.size]
        if self.fit == "cover":
            return functional.center_crop(self._resized(picture, [self.size]), whole)
        if self.fit == "square":
            return self._resized(functional.center_crop(picture, [short, short]), whole)
        return functional.center_crop(picture, whole) if short >= self.size else self._resized(picture, whole)

    def batch(self, pictures: Tensor) -> Tensor:
        """Returns images (B, 3, H, W) uint8 in this frame, (B, 3, size, size) uint8."""
        if tuple(check_images(pictures).shape[-2:]) == (self.size, self.size):
            return pictures
        framed = [self(Image.fromarray(p)) for p in pictures.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in framed])).permute(0, 3, 1, 2)

    def _resized(self, picture: Image.Image, size: list[int]) -> Image.Image:
        """Resizes with Pillow: to (height, width), or given one size, the shorter side to it, as torchvision rounds."""
        return functional.resize(picture, size, FILTERS[self.filter])
