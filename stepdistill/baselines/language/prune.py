"""A decoder without its least important parts (Muralidharan et al. 2024, *Compact Language Models via Pruning and
Knowledge Distillation*, section 2; NVIDIA's Minitron).

    kept = choose(importance(network, batches), network.config, Shares(layers=0.33, neurons=0.25))
    smaller = cut(network, kept)          # a network of the same class, saved and loaded like any other
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.baselines.language.configs import plain
from stepdistill.baselines.language.families import family, head_size, shares_keys
from stepdistill.baselines.language.importance import importance
from stepdistill.baselines.language.shares import Kept, Shares, choose
from stepdistill.baselines.language.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOGETHER = 8  # rows in a batch when activations are read


@torch.no_grad()
def cut(network: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """Returns a new network of the same class with what is kept of this one.

    Norms divide by a mean over the channels: their weights, and epsilon, are scaled to compensate for fewer of them, so
    that removing channels that are zero changes nothing (with LayerNorm, if the mean of the others is 0 too).
    """
    config, kind = plain(network.config), family(network.config)
    size = head_size(config)
    config.num_hidden_layers, config.hidden_size = len(kept.layers), len(kept.channels)
    config.num_attention_heads = kept.heads.shape[1]
    setattr(config, kind.inner, kept.neurons.shape[1])
    more = network.config.hidden_size / config.hidden_size
    setattr(config, kind.epsilon, getattr(config, kind.epsilon) * more)
    if not kind.tied:
        config.head_dim = size
        if not shares_keys(network.config):
            config.num_key_value_heads = config.num_attention_heads
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept.layers]
    places = [_places(kept, i, network.config) for i in range(len(kept.layers))]
    state = {}
    for name, tensor in network.state_dict().items():
        layer, inner = 0, name.removeprefix(kind.layers + ".")
        if inner != name:
            index, _, inner = inner.partition(".")
            found = (kept.layers == int(index)).nonzero()
            if not len(found):
                continue
            layer = found.item()
            name = f"{kind.layers}.{layer}.{inner}"
        axes = next(axes for end, axes in kind.axes.items() if name.endswith(end))
        for axis, over in enumerate(axes):
            if over is not None and places[layer][over] is not None:
                tensor = tensor.index_select(axis, places[layer][over].to(tensor.device))
        is_norm = axes == ("channels",) and name.endswith("weight")
        state[name] = tensor * more**0.5 if is_norm else tensor
    smaller = type(network)(config).to(network.dtype)
    smaller.load_state_dict(state)
    return smaller.to(network.device).eval()


def _places(kept: Kept, layer: int, config: PretrainedConfig) -> dict[str, Tensor | None]:
    """The indices that stay along each kind of axis in a layer of the smaller network; None for all."""
    size = head_size(config)
    heads = (kept.heads[layer][:, None] * size + torch.arange(size)).flatten()
    fused = torch.cat([heads + part * config.num_attention_heads * size for part in range(3)])
    keys = None if shares_keys(config) else heads
    return {"channels": kept.channels, "neurons": kept.neurons[layer], "queries": heads, "keys": keys, "fused": fused}


def pruned(spec: str, network: PreTrainedModel, rows: Tokens) -> PreTrainedModel:
    """Prunes a decoder as `spec` says, e.g. prune:layers=0.2,neurons=0.25, by its activations on these rows.

    Raises:
        InputError: see Shares.read and choose.
    """
    shares = Shares.read(spec)
    family(network.config)
    device = next(network.parameters()).device
    parts = (rows[at : at + TOGETHER] for at in range(0, len(rows), TOGETHER))
    found = importance(network, ((part.ids.to(device), part.attention.to(device)) for part in parts))
    return cut(network, choose(found, network.config, shares))
