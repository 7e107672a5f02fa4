"""Conditions are dictionaries of tensors with canonical names; a conditioner makes them from prompts.

text (B, S, D)      token states           text_mask (B, S)   attention mask
pooled (B, P)       pooled text            time_ids (B, 6)    SDXL's sizes and crops
labels (B,)         classes                guidance (B,)      w of a guidance-conditioned student
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Cond = dict[str, Tensor]


class Conditioner(Protocol):
    """Turns prompts into conditions."""

    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Cond:
        """Returns conditions of batch size len(prompts); `size` is the image's (height, width) in pixels."""

    def unconditional(self, n: int = 1, *, size: tuple[int, int] | None = None) -> Cond:
        """Returns the condition that guidance moves away from, n times."""


def take(cond: Cond, index: Tensor | slice) -> Cond:
    """Selects the conditions of some samples."""
    return {key: value[index] for key, value in cond.items()}


def to(cond: Cond, device: torch.device | str, dtype: torch.dtype | None = None) -> Cond:
    """Moves conditions to a device; casts floating-point entries to `dtype` if it is given."""
    return {
        key: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        for key, value in cond.items()
    }


def expand(cond: Cond, n: int) -> Cond:
    """Expands a condition of batch size 1 to n, without a copy."""
    return {key: value.expand(n, *value.shape[1:]) for key, value in cond.items()}
