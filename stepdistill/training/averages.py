"""Exponential moving averages of trained parameters, which can stand in for them.

One mechanism serves a consistency target and averaged weights for export: the network is called with the averages in
place of its parameters, so no second network is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Averages:
    """average <- decay average + (1 - decay) parameter, after each update.

    Args:
        parameters: names and the parameters followed; averages start as copies.
        decay: in [0, 1). 0 follows exactly.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the parameters."""
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self.parameters.values()], 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the network has the averages for weights. Only for calls without gradients."""
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = self.values[name]
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]
