"""On a CPU, networks see a few samples at a time: feature maps then stay in its cache, and memory is reused rather than
requested from the system and zeroed.

Parts of MANY samples give the same bits as larger batches do. FEW are for the first layers, whose maps are largest: in
some later ones oneDNN chooses another kernel for so few, which rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MANY, FEW = 16, 4


def in_parts(see: Callable[[Tensor], Tensor], samples: Tensor, least: int) -> Tensor:
    """Applies `see` to parts of samples (B, ...) that differ in size by at most one, none smaller than `least` or the
    number of threads; on a GPU, or if there are fewer samples, to all at once."""
    least = max(least, torch.get_num_threads())
    count = max(1, len(samples) // least) if samples.device.type == "cpu" else 1
    return torch.cat([see(part) for part in samples.tensor_split(count)])


class Parts(nn.Module):
    """Layers that see FEW samples at a time; see `in_parts`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, samples: Tensor) -> Tensor:
        return in_parts(self.layers, samples, FEW)
