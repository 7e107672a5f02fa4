"""A lean forward for peft's LoRA layers: the same sum in fewer and cheaper operations.

A LoRA layer (Hu et al. 2021) is y = W x + b + scale B A x. peft adds casts to float32, a product, a sum and a type
check around it, and saves their results for the backward. Here it is one of

    side    y = W x + b, to which scale B (A x) is added in place
    fold    y = (W + scale B A) x + b, saving only x for the backward

Folding costs one product of weights, and in the backward the full gradient of W; it pays if there are many more
positions than channels, or if no gradient is needed. In half precision it would round the adapter away (a bfloat16
weight has eight bits), so it is used in float32 only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THIN = 3.0  # time per multiplication of a product with a thin matrix, relative to a square one


@dataclass
class Switch:
    """The current state of all adapters of a network: on or off, with or without dropout."""

    on: bool = True
    dropout: bool = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context in which the network is what it was without adapters."""
        self.on, before = False, self.on
        try:
            yield
        finally:
            self.on = before

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Context in which adapters apply no dropout."""
        self.dropout, before = False, self.dropout
        try:
            yield
        finally:
            self.dropout = before


def fold_pays(positions: int, channels_in: int, channels_out: int, rank: int, gradient: bool) -> bool:
    """Whether folding takes less work than the side path, counted in multiplications.

    Args:
        positions: outputs per channel, over the whole batch. channels_in: input channels times kernel size.
    """
    merge = rank * channels_in * channels_out
    side = THIN * positions * rank * (channels_in + channels_out)
    if not gradient:
        return merge < side
    return 4 * merge + positions * channels_in * channels_out < 3 * side


class Fold(torch.autograd.Function):
    """(W + scale B A) x + b, with gradients for x, A and B. `conv` is (stride, padding, dilation), None if linear."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, conv):
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale, ctx.conv = scale, conv
        merged = fold(weight, down, up, scale)
        return F.linear(x, merged, bias) if conv is None else F.conv2d(x, merged, bias, *conv)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, down, up = ctx.saved_tensors
        merged = fold(weight, down, up, ctx.scale)
        if ctx.conv is None:
            dx = dy @ merged if ctx.needs_input_grad[0] else None
            dw = dy.flatten(0, -2).T @ x.flatten(0, -2)
        else:
            stride, padding, dilation = ctx.conv
            dx, dw, _ = torch.ops.aten.convolution_backward(
                dy, x, merged, None, stride, padding, dilation, False, (0, 0), 1, (ctx.needs_input_grad[0], True, False)
            )
            dw = dw.flatten(1)
        d_down = ctx.scale * (up.flatten(1).T @ dw)
        d_up = ctx.scale * (dw @ down.flatten(1).T)
        return dx, None, None, d_down.view_as(down), d_up.view_as(up), None, None


def fold(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + scale B A, for linear weights (out, in) and convolutions (out, in, h, w)."""
    return torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=scale).view_as(weight)


def lean_forward(layer, adapter: str, switch: Switch, x: Tensor) -> Tensor:
    """The layer's output for x by the cheaper path; by peft's own forward if the layer's state is not a plain one."""
    base = layer.base_layer
    if not switch.on:
        return base(x)
    if layer.disable_adapters or layer.merged or layer.active_adapters != [adapter]:
        return type(layer).forward(layer, x)
    down, up, scale = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    dropout = layer.lora_dropout[adapter]
    conv = (base.stride, base.padding, base.dilation) if isinstance(base, nn.Conv2d) else None
    plain = isinstance(dropout, nn.Identity) or not switch.dropout
    if plain and x.dtype == base.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
        gradient = torch.is_grad_enabled()
        if fold_pays(positions(x, base), down[0].numel(), len(up), len(down), gradient):
            if gradient:
                return Fold.apply(x, base.weight, base.bias, down, up, scale, conv)
            merged = fold(base.weight, down, up, scale)
            return F.linear(x, merged, base.bias) if conv is None else F.conv2d(x, merged, base.bias, *conv)
    y = base(x)
    x = (x if plain else dropout(x)).to(y.dtype)
    down, up = down.to(y.dtype), up.to(y.dtype)
    if conv is None:
        y.flatten(0, -2).addmm_(F.linear(x, down).flatten(0, -2), up.T, alpha=scale)
        return y
    return y.add_(F.conv2d(F.conv2d(x, down, None, *conv), up), alpha=scale)


def positions(x: Tensor, base: nn.Module) -> int:
    """Outputs per channel: batch times tokens, or times height and width after the stride."""
    if isinstance(base, nn.Conv2d):
        return len(x) * (x.shape[-2] // base.stride[0]) * (x.shape[-1] // base.stride[1])
    return x.numel() // x.shape[-1]


def make_lean(layers: list[nn.Module], adapter: str) -> Switch:
    """Gives linear and plain 2-D convolution layers the lean forward; returns the switch for all of them.

    Layers of another kind (grouped convolutions, adapters with a bias or a variant) keep peft's forward.
    """
    switch = Switch()
    for layer in layers:
        base = layer.base_layer
        kind = type(base) is nn.Linear or (
            type(base) is nn.Conv2d and base.groups == 1 and base.padding_mode == "zeros"
        )
        simple = layer.lora_B[adapter].bias is None and not getattr(layer, "lora_variant", {})
        if kind and simple:
            layer.forward = partial(lean_forward, layer, adapter, switch)
        else:
            layer.forward = partial(switched_forward, layer, switch)
    return switch


def switched_forward(layer, switch: Switch, *args, **kwargs) -> Tensor:
    """peft's own forward, with the switch."""
    return type(layer).forward(layer, *args, **kwargs) if switch.on else layer.base_layer(*args, **kwargs)
