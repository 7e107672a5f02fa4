"""The embedded set: 32x32 images of two pixel-art people each, with captions and exact attributes.

Art by DiceBear (CC0), composed by assets/avatars/make/compose.py.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from stepdistill import embedded
from stepdistill.errors import InputError

SIZE = 32


@dataclass(frozen=True)
class AvatarSet:
    """N images with their captions and attributes.

    Attributes:
        images: (N, 32, 32, 3) uint8.
        captions: N sentences, each naming some of the image's attributes.
        attributes: all attributes of each image, name -> class.
        mentioned: the names of the attributes in each caption.
    """

    images: np.ndarray
    captions: list[str]
    attributes: list[dict[str, str]]
    mentioned: list[list[str]]

    def __len__(self) -> int:
        return len(self.captions)


@lru_cache(maxsize=2)
def load(split: str) -> AvatarSet:
    """Loads the `train` split (20,000 images) or the held-out `test` split (2,500).

    Raises:
        InputError: an unknown split.
    """
    if split not in ("train", "test"):
        raise InputError(f"split of the embedded set: got {split!r}; allowed: train, test")
    folder = embedded.path("avatars")
    with gzip.open(folder / f"{split}.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    sheets = []
    for file in sorted(folder.glob(f"{split}-*.webp")):
        sheet = np.asarray(Image.open(file).convert("RGB"))
        height, width, _ = sheet.shape
        tiles = sheet.reshape(height // SIZE, SIZE, width // SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4)
        sheets.append(tiles.reshape(-1, SIZE, SIZE, 3))
    images = np.concatenate(sheets)
    return AvatarSet(
        images=images,
        captions=[row["text"] for row in rows],
        attributes=[row["attributes"] for row in rows],
        mentioned=[row["mentioned"] for row in rows],
    )
