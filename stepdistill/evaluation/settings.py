"""How a benchmark is run, beside what its protocol fixes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from stepdistill.errors import InputError

BATCH, SIDE = 64, 256  # pictures at a time up to so many pixels a side; of larger ones as many pixels in all


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run; none of it changes a quality figure but by rounding.

    Attributes:
        batch: pictures drawn at a time; by their size where None (see `batch_of`). device: where; a GPU if there is.
        latency_repeats: timed calls of one picture, 0 are none; None are 10, or fewer that take 20 s.
        latency_batch: pictures in the calls of another timing, 1 is none. compiled: time the network compiled.
        channels_last: lay UNets and autoencoders out so.
        keep: keep the drawn pictures of cells up to 2 GiB (see `pictures`); others only until they are measured.
        floor: measure real pictures and reconstructions too. grid: pictures kept of each cell. progress: show a bar.

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
        """Pictures of so many pixels a side to be drawn at a time: 64 up to 256 pixels, 16 of 512, 4 of 1024."""
        if self.batch is not None:
            return self.batch
        return max(1, BATCH * SIDE**2 // max(side or 0, SIDE) ** 2)


@contextmanager
def room(batch: int) -> Iterator[None]:
    """Within, a lack of memory is said in one line.

    Raises:
        InputError: a GPU's memory has no room for a batch.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"memory: got no room for {batch} pictures at a time; allowed: fewer; lower --batch"
        ) from error
