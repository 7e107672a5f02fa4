"""Captures the inputs and outputs of a network's modules during a call.

with capture(network, ["layer2", "layer3"]) as captured:
    network(x)
captured["layer2"]          # the output of layer2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def output(module: nn.Module, inputs: tuple, out: object) -> object:
    """Returns a module's output; of a tuple, the first element."""
    return out[0] if isinstance(out, tuple) else out


def first_input(module: nn.Module, inputs: tuple, out: object) -> object:
    """Returns a module's first positional input."""
    return inputs[0]


@contextmanager
def capture(
    network: nn.Module, names: Sequence[str], keep: Callable[[nn.Module, tuple, object], T] = output
) -> Iterator[dict[str, T]]:
    """Context in which each call of the network stores the result of `keep` for these modules, by name.

    Args:
        names: of submodules. keep: called with (module, its positional inputs, its output).
    """
    captured: dict[str, T] = {}

    def hook_of(name: str):
        def hook(module: nn.Module, inputs: tuple, out: object) -> None:
            captured[name] = keep(module, inputs, out)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
