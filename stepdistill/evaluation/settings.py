"""Settings of a benchmark run that its protocol does not fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from stepdistill.errors import InputError

BATCH, SIDE = 64, 256  # batch size for images up to SIDE pixels a side; larger ones get as many pixels in total


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run; none of it changes a quality figure by more than rounding.

    Attributes:
        batch: batch size; None chooses it by image size (see `batch_of`). device: by default a GPU if there is one.
        latency_repeats: timed calls for one image, 0 for none; None means 10, or as many, at least 3, as take 20 s.
        latency_batch: images per call of a second timing, 1 for none. compiled: time the compiled network.
        channels_last: use this memory format for UNets and autoencoders.
        keep: keep the images of cells up to 2 GiB (see `pictures`); larger cells only until they are measured.
        floor: also measure real images and reconstructions. grid: images stored per cell. progress: show a bar.

    Raises:
        InputError: a number out of range.
    """

    batch: int | None = None
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    latency_batch: int = 1
    latency_repeats: int | None = None
    keep: bool = True
    compiled: bool = False
    channels_last: bool = False
    floor: bool = True
    grid: int = 8
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("latency_batch", 1), ("latency_repeats", 0), ("grid", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name}: got {value}; allowed: {least} or more")

    def batch_of(self, side: int | None = None) -> int:
        """Returns the batch size for images of `side` pixels: by default 64 up to 256, 16 at 512, 4 at 1024."""
        if self.batch is not None:
            return self.batch
        return max(1, BATCH * SIDE**2 // max(side or 0, SIDE) ** 2)


@contextmanager
def room(batch: int) -> Iterator[None]:
    """Turns a GPU's out-of-memory error within the block into one line.

    Raises:
        InputError: the batch does not fit into the GPU's memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"memory: got no room for {batch} pictures at a time; allowed: fewer; lower --batch"
        ) from error
