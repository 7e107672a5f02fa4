"""The parts of a decoder that stay when shares of them are pruned, the least important first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.baselines.language.families import family, head_size, shares_keys
from stepdistill.baselines.language.importance import Importance
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WIDE, STEP = 1024, 64  # of so many parts or more, a multiple of this stays: tensor cores compute such widths faster


@dataclass(frozen=True)
class Shares:
    """The share of each kind of part to prune, from 0 to below 1."""

    layers: float = 0.0
    heads: float = 0.0
    channels: float = 0.0
    neurons: float = 0.0

    @classmethod
    def read(cls, spec: str) -> Shares:
        """Parses `prune:layers=0.2,neurons=0.25`, with any of the four.

        Raises:
            InputError: an unknown name, no number, or a share that is out of range.
        """
        shares = {}
        for pair in spec.removeprefix("prune:").split(","):
            name, _, share = pair.partition("=")
            try:
                shares[name] = float(share)
                if name not in cls.__dataclass_fields__ or not 0 <= shares[name] < 1:
                    raise ValueError
            except ValueError as error:
                raise InputError(
                    f"student: got {spec}; allowed: prune: and shares that go, 0 to below 1, of "
                    f"{', '.join(cls.__dataclass_fields__)}, as prune:layers=0.2,neurons=0.25"
                ) from error
        return cls(**shares)


@dataclass(frozen=True)
class Kept:
    """The indices that stay, ascending; heads and neurons for each layer that stays."""

    layers: Tensor
    heads: Tensor
    channels: Tensor
    neurons: Tensor


def choose(found: Importance, config: PretrainedConfig, shares: Shares) -> Kept:
    """Chooses what stays when these shares are pruned. Heads that share keys and values are ranked only against each
    other, so that every group keeps as many; the channels that stay are a multiple of the heads that stay. Of 1,024
    neurons or channels and more, a multiple of 64 stays if any go; of channels only if multiples of both 64 and the
    heads are close enough.

    Raises:
        InputError: nothing of a kind would stay, or the network's class cannot represent what stays.
    """
    shared, size, tied = shares_keys(config), head_size(config), family(config).tied
    heads = found.heads.unflatten(1, (config.num_key_value_heads if shared else 1, -1))
    layers = _largest(found.layers, shares.layers, "layers")
    within = _largest(heads[layers], shares.heads, "heads that share keys" if shared else "heads")
    kept = (within + torch.arange(heads.shape[1])[:, None] * heads.shape[-1]).flatten(1)
    # transformers refuses a Llama whose heads do not divide its channels; a GPT-2 has the channels of its heads
    of = 1 if tied else _multiple(found.channels, shares.channels, kept.shape[1])
    channels = _largest(found.channels, shares.channels, "channels", of)
    if tied and kept.shape[1] * size != len(channels):
        share = 1 - max(len(channels) // size, 1) * size / config.hidden_size
        got = f"{len(channels)} channels and {kept.shape[1]} heads of {size}"
        raise InputError(
            f"student: got {got}; allowed: of a {config.model_type}, as many channels as heads times "
            f"their size; give channels={share:.3g} and heads={share:.3g}"
        )
    of = _multiple(found.neurons, shares.neurons)
    return Kept(layers, kept, channels, _largest(found.neurons[layers], shares.neurons, "neurons", of))


def _multiple(values: Tensor, share: float, of: int = 1) -> int:
    """What the number of parts that stay is a multiple of: of `of`, and of STEP if they are WIDE and any go."""
    count, both = values.shape[-1], math.lcm(of, STEP)
    return both if share and count >= WIDE and both <= count // 8 else of


def _largest(values: Tensor, share: float, what: str, of: int = 1) -> Tensor:
    """Indices, ascending, of what stays along the last axis; their number is a multiple of `of`."""
    stay = min(round(values.shape[-1] * (1 - share) / of), values.shape[-1] // of) * of
    if stay < 1:
        raise InputError(
            f"student: got {share:g} of {values.shape[-1]} {what} pruned, which leaves none; allowed: less"
        )
    return values.topk(stay, -1).indices.sort(-1).values
