"""Conditions are dictionaries of tensors with canonical names; a conditioner makes them from prompts.

text (B, S, D)      token states           text_mask (B, S)   which tokens count
pooled (B, P)       pooled text            time_ids (B, 6)    SDXL's sizes and crops
labels (B,)         classes                guidance (B,)      w of a w-conditioned student
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from stepdistill.errors import InputError

Cond = dict[str, Tensor]


class Conditioner(Protocol):
    """Turns prompts into conditions."""

    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Cond:
        """Conditions of the prompts, batch len(prompts); `size` is the picture's (height, width) in pixels."""

    def unconditional(self, n: int = 1, *, size: tuple[int, int] | None = None) -> Cond:
        """The condition guidance moves away from, n times."""


def concat(a: Cond, b: Cond) -> Cond:
    """Two batches one after the other.

    Raises:
        InputError: they do not hold the same entries.
    """
    if a.keys() != b.keys():
        raise InputError(f"conditions: got {sorted(a)} and {sorted(b)}; allowed: the same entries; use one conditioner")
    return {key: torch.cat([a[key], b[key]]) for key in a}


def take(cond: Cond, index: Tensor | slice) -> Cond:
    """The conditions of some samples."""
    return {key: value[index] for key, value in cond.items()}


def to(cond: Cond, device: torch.device | str, dtype: torch.dtype | None = None) -> Cond:
    """Moved to a device; floating-point entries cast to `dtype` where it is given."""
    return {
        key: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        for key, value in cond.items()
    }


def expand(cond: Cond, n: int) -> Cond:
    """A condition of batch 1 as one of batch n, without a copy."""
    return {key: value.expand(n, *value.shape[1:]) for key, value in cond.items()}


def stack(conds: Sequence[Cond]) -> Cond:
    """Conditions of single samples, without a batch dimension, as one batch."""
    return {key: torch.stack([cond[key] for cond in conds]) for key in conds[0]}
