"""How a benchmark is run, beside what its protocol fixes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from stepdistill.errors import InputError


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run; none of it changes a quality figure but by rounding.

    Attributes:
        batch: pictures drawn at a time. device: where; a GPU if there is one.
        latency_repeats: timed calls of one picture, 0 are none. latency_batch: pictures in the calls of another timing,
            1 is none. compiled: time the network compiled.
        channels_last: lay UNets and autoencoders out so.
        keep: keep the drawn pictures of cells up to 2 GiB (see `pictures`); others only until they are measured.
        floor: measure real pictures and reconstructions too. grid: pictures kept of each cell. progress: show a bar.

    Raises:
        InputError: a number out of range.
    """

    batch: int = 64
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    latency_batch: int = 1
    latency_repeats: int = 10
    keep: bool = True
    compiled: bool = False
    channels_last: bool = False
    floor: bool = True
    grid: int = 8
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("latency_batch", 1), ("latency_repeats", 0), ("grid", 0)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"{name}: got {value}; allowed: {least} or more")
