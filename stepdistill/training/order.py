"""The order of samples, as a function of their position in the run."""

from __future__ import annotations

from functools import lru_cache

import torch

from stepdistill.draws import mix


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(mix(seed, ~epoch))
    return torch.randperm(length, generator=generator).tolist()


def sample_indices(seed: int, first: int, count: int, length: int) -> list[int]:
    """Indices of the samples at positions first to first + count - 1, of `length`; each epoch is a new permutation."""
    places = range(first, first + count)
    return [_permutation(seed, place // length, length)[place % length] for place in places]
