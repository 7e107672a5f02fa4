"""What modules of a network take in and give out, while it is called.

with listening(network, ["layer2", "layer3"]) as heard:
    network(x)
heard["layer2"]          # what layer2 returned
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def output(module: nn.Module, inputs: tuple, out: object) -> object:
    """What a module returned; of a tuple, the first."""
    return out[0] if isinstance(out, tuple) else out


def first_input(module: nn.Module, inputs: tuple, out: object) -> object:
    """What a module was called with first."""
    return inputs[0]


@contextmanager
def listening(
    network: nn.Module, names: Sequence[str], keep: Callable[[nn.Module, tuple, object], T] = output
) -> Iterator[dict[str, T]]:
    """Within, each call of the network leaves what `keep` makes of these modules in the dictionary, by name.

    Args:
        names: of submodules. keep: of (module, its positional inputs, its output).
    """
    heard: dict[str, T] = {}

    def hear(name: str):
        def hook(module: nn.Module, inputs: tuple, out: object) -> None:
            heard[name] = keep(module, inputs, out)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(hear(name)) for name in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
