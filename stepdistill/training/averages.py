"""Exponential moving averages of trained parameters, which can be swapped in for them.

One mechanism serves a consistency target and averaged weights for export: the network is called with the averages in
place of its parameters, so no second network is kept. Sharded parameters (sharding.py) have sharded averages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stepdistill.training.sharding import own


class Averages:
    """average <- decay average + (1 - decay) parameter, after each update.

    Args:
        parameters: names and parameters to average; the averages start as copies.
        decay: in [0, 1). 0 copies the parameters.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        self._placed = False

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages one step towards the parameters."""
        averages = [own(value) for value in self.values.values()]
        torch._foreach_lerp_(averages, [own(p.detach()) for p in self.parameters.values()], 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the network uses the averages as weights. Only for calls without gradients."""
        if self._placed:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swaps parameters and averages; if sharded, their values, since gathered weights are kept elsewhere."""
        self._placed = not self._placed
        for name, p in self.parameters.items():
            if isinstance(p, DTensor):
                mine, average = own(p), own(self.values[name])
                before = mine.clone()
                mine.copy_(average)
                average.copy_(before)
            else:
                p.data, self.values[name] = self.values[name], p.data
