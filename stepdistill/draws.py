"""Random numbers that depend on the sample, not on the process.

Each training sample has a counter, its position in the run. All noise, times and guidance weights of that sample come
from a generator seeded with (seed, counter), so a resumed run, or one on another number of processes, draws the same
numbers, and there is no RNG state to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 63) - 1


def mix(seed: int, counter: int) -> int:
    """Combines two integers into a 63-bit seed (the finalizer of SplitMix64, Steele et al. 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + counter * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & ((1 << 64) - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (z ^ (z >> 31)) & _MASK


class Draws:
    """Per-sample random numbers for a batch of B samples.

    Args:
        seeds: one integer per sample.
        device: of the returned tensors. The numbers are generated on the CPU, so they do not depend on it.
    """

    def __init__(self, seeds: list[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(s & _MASK) for s in seeds]
        self.device = torch.device(device)

    @classmethod
    def at(cls, seed: int, first: int, count: int, device: torch.device | str = "cpu") -> Draws:
        """Returns the draws of samples `first` to `first + count - 1` of the run with this seed."""
        return cls([mix(seed, first + i) for i in range(count)], device)

    def __len__(self) -> int:
        return len(self.generators)

    def _stack(self, draw) -> Tensor:
        drawn = torch.stack([draw(g) for g in self.generators])
        if self.device.type == "cuda":
            drawn = drawn.pin_memory()  # a copy of pageable memory would wait for the device
        return drawn.to(self.device, non_blocking=True)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, (B, *shape), float32."""
        return self._stack(lambda g: torch.randn(shape, generator=g))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape), float32."""
        return self._stack(lambda g: torch.rand(shape, generator=g))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), (B, *shape), int64."""
        return self._stack(lambda g: torch.randint(high, shape, generator=g))
