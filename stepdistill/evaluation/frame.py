"""What of a picture is looked at: a protocol brings every picture, real or drawn, to one side in one way.

    frame = Frame(256, "square", "lanczos")       # DMD2's, for COCO
    frame(picture)                                # a PIL picture
    frame.batch(pictures)                         # uint8 (B, 3, H, W) -> (B, 3, 256, 256)

It comes before the extractor's own resize: a model of 512 pixels that is measured at 256 goes through both.

| fit | how |
|---|---|
| cover | the shorter side to `size`, then the centre (torchvision's Resize and CenterCrop: SANA on MJHQ) |
| square | the largest centred square, then to `size` (DMD2 on COCO) |
| crop | the centre, pixel by pixel (DMD2's patches); a picture too small for it is brought to `size` whole |
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
    """Pictures of `size` pixels a side.

    Attributes:
        fit: one of FITS. filter: of Pillow's, one of FILTERS.

    Raises:
        InputError: another fit, filter or size.
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
        """An RGB picture in its frame."""
        short, whole = min(picture.size), [self.size, self.size]
        if self.fit == "cover":
            return functional.center_crop(self._resized(picture, [self.size]), whole)
        if self.fit == "square":
            return self._resized(functional.center_crop(picture, [short, short]), whole)
        return functional.center_crop(picture, whole) if short >= self.size else self._resized(picture, whole)

    def batch(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 (B, 3, H, W) in their frame, uint8 (B, 3, size, size)."""
        if tuple(check_images(pictures).shape[-2:]) == (self.size, self.size):
            return pictures
        framed = [self(Image.fromarray(p)) for p in pictures.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in framed])).permute(0, 3, 1, 2)

    def _resized(self, picture: Image.Image, size: list[int]) -> Image.Image:
        """By Pillow, to (height, width), or with its shorter side to the one size there is, as torchvision rounds."""
        return functional.resize(picture, size, FILTERS[self.filter])
