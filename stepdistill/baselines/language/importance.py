"""Importance of a decoder's parts, estimated from activations (Muralidharan et al. 2024, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepdistill.baselines.language.families import family, head_size
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.reduce import wide
from stepdistill.hooks import capture, first_input, output

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Importance:
    """Importance of L layers (L,), H channels (H,), heads (L, heads) and MLP neurons (L, neurons); higher is more."""

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
