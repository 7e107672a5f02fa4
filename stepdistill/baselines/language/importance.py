"""Importance of a decoder's parts, estimated from activations (Muralidharan et al. 2024, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepdistill.baselines.language.families import family, head_size, shares_keys
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.reduce import wide
from stepdistill.errors import InputError
from stepdistill.hooks import capture, first_input, output

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
class Importance:
    """Importance of L layers (L,), H channels (H,), heads (L, heads) and MLP neurons (L, neurons); higher is more."""

    layers: Tensor
    heads: Tensor
    channels: Tensor
    neurons: Tensor


@dataclass(frozen=True)
class Kept:
    """The indices that stay, ascending; heads and neurons for each layer that stays."""

    layers: Tensor
    heads: Tensor
    channels: Tensor
    neurons: Tensor


@torch.no_grad()
def importance(network: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Importance:
    """Computes importance on a few batches (ids, mask), each (B, S): the mean over a sequence, then the L2 norm over
    sequences, which the authors found best; the sum for layers.

    It is |output| of all norms for a channel, the norm of its part of the output projection's input for a head,
    |activation| for a neuron, and 1 - cos(input, output) for a layer.
    """
    kind, config = family(network.config), network.config
    layers = [f"{kind.layers}.{i}" for i in range(config.num_hidden_layers)]
    norms = [f"{layer}.{norm}" for layer in layers for norm in kind.norms]
    heads, mlps = ([f"{layer}.{end}" for layer in layers] for end in (kind.attended, kind.fired))
    size = head_size(config)
    sums: dict[str, Tensor] = {}
    for ids, mask in batches:
        weights = mask.double() / mask.sum(1, keepdim=True).clamp(min=1)
        with (
            capture(network, layers, partial(_change, weights)) as changed,
            capture(network, norms, partial(_size, output, weights)) as normed,
            capture(network, heads, partial(_by_head, size, weights)) as attended,
            capture(network, mlps, partial(_size, first_input, weights)) as fired,
        ):
            logits(network, ids, mask)
        found = {
            "layers": torch.stack(list(changed.values())).double().sum(1),
            "heads": torch.stack(list(attended.values())).double().square().sum(1),
            "channels": torch.stack(list(normed.values())).double().sum(0).square().sum(0),
            "neurons": torch.stack(list(fired.values())).double().square().sum(1),
        }
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value.cpu()
    return Importance(sums["layers"], *(sums[name].sqrt() for name in ("heads", "channels", "neurons")))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over a sequence: (B, S, ...) and (B, S) to (B, ...)."""
    values = wide(values)
    return torch.einsum("bs...,bs->b...", values, weights.to(values))


def _change(weights: Tensor, module: nn.Module, inputs: tuple, out: object) -> Tensor:
    before, after = first_input(module, inputs, out), output(module, inputs, out)
    return _mean(1 - nn.functional.cosine_similarity(before, after, dim=-1), weights)


def _size(what: Callable, weights: Tensor, *heard: object) -> Tensor:
    return _mean(what(*heard).abs(), weights)


def _by_head(size: int, weights: Tensor, module: nn.Module, inputs: tuple, out: object) -> Tensor:
    return _mean(first_input(module, inputs, out).unflatten(-1, (-1, size)).norm(dim=-1), weights)


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
