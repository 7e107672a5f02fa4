"""The LoRA adapter of a network: which layers carry it, and whether weights fit it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.export.folder import ADAPTER
from stepdistill.training.networks import trainable

LORA_TARGETS = (  # each network uses those it has: UNet, MMDiT, linear DiT
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
    "conv_inverted", "conv_point",
    # layers that embed the timestep in a transformer, as time_emb_proj in a UNet: without them training is far slower
    "norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "adaln_single.linear",
    "time_embed.linear", "timestep_embedder.linear_1", "timestep_embedder.linear_2",
)  # fmt: skip


def adapter_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers that carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]


def adaptable(backbone: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """`matching` for a network that has no adapter yet.

    Raises:
        InputError: it has an adapter; or see `matching`.
    """
    if adapter_layers(backbone):
        raise InputError("teacher: got one that carries an adapter already; allowed: a plain one; load it again")
    return matching(backbone, endings)


def matching(backbone: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """Those of `endings` that the name of some linear or convolution layer ends in.

    Raises:
        InputError: none matches, or one does not (allowed for the defaults, as not every network has all of them).
    """
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    known = [e for e in endings if any(n == e or n.endswith(f".{e}") for n in names)]
    unknown = [e for e in endings if e not in known] if tuple(endings) != LORA_TARGETS else []
    if unknown or not known:
        parts = [n.split(".") for n in names]
        last = sorted({".".join(p[-2:]) if p[-1].isdigit() else p[-1] for p in parts})
        got = ", ".join(unknown or endings) or "none"
        raise InputError(
            f"target modules: got {got}, which match no layer; allowed: endings such as {', '.join(last[:12])}"
        )
    return known


def settings_of(rank: int, known: list[str], alpha: float | None = None, dropout: float = 0.0):
    """peft's settings of an adapter on the layers whose names end in `known`; alpha is the rank by default."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=alpha or rank, target_modules=known, lora_dropout=dropout, init_lora_weights="gaussian"
    )


def adapter_like(backbone: nn.Module, rank: int, endings: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters of a new adapter for a network, without allocating memory; the network is not changed.

    Raises:
        InputError: see `adaptable`.
    """
    from accelerate import init_empty_weights
    from peft import inject_adapter_in_model

    settings = settings_of(rank, adaptable(backbone, endings))
    with init_empty_weights(), torch.random.fork_rng(devices=()):
        config = {name: value for name, value in backbone.config.items() if not name.startswith("_")}
        empty = type(backbone).from_config(config).requires_grad_(False)
        inject_adapter_in_model(settings, empty, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    return trainable(empty)


def restore(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    """Copies weights into the parameters of the same names.

    Raises:
        InputError: see `check_fits`.
    """
    check_fits(parameters, weights)
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])


def check_fits(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    """Checks that weights fit an adapter with these parameters.

    Raises:
        InputError: the names or the shapes differ.
    """
    shapes, others = ({name: tuple(v.shape) for name, v in group.items()} for group in (parameters, weights))
    if shapes != others:
        odd = next(name for name in sorted(shapes | others) if shapes.get(name) != others.get(name))
        raise InputError(
            f"adapter: got {odd} of shape {others.get(odd)}, wanted {shapes.get(odd)}; allowed: one made with the same "
            "--rank and --target-modules"
        )
