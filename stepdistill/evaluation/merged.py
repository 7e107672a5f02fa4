"""A pipeline whose LoRAs are for a while part of its weights, as `fuse_lora` makes them to serve it.

with merged(pipeline):
    measure(...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def merged(pipeline) -> Iterator[None]:
    """Context in which every layer with active LoRAs is the plain layer with the weight W + scale B A.

    Left apart, a LoRA's own layers are computed beside the network's at every step, and a student's latency would say
    more of its adapter than of its steps. Afterwards weights and layers are what they were, bit for bit; meanwhile a
    copy of the weights concerned is in host memory.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    undo: list[tuple[nn.Module, str, nn.Module, dict[str, Tensor]]] = []
    try:
        for module in (part for part in pipeline.components.values() if isinstance(part, nn.Module)):
            layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
            for path, layer in layers.items():
                base = layer.get_base_layer()
                kept = {name: weight.detach().to("cpu", copy=True) for name, weight in base.named_parameters()}
                owner, name = module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
                undo.append((owner, name, layer, kept))
                if not layer.disable_adapters:
                    layer.merge()
                setattr(owner, name, base)
        yield
    finally:
        for owner, name, layer, kept in reversed(undo):
            setattr(owner, name, layer)
            if layer.merged:
                layer.unmerge()  # to within rounding
            with torch.no_grad():
                for of, weight in layer.get_base_layer().named_parameters():
                    weight.copy_(kept[of])
