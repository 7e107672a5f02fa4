"""Frozen weights divided among the processes: FSDP2 for students that are adapters.

    accelerate launch --config_file train_scripts/configs/accelerate/fsdp2.yaml train_scripts/train_ladd.py ...

What is large in a LoRA's training is the network under it. Its weights are divided by torch's `fully_shard` (Zhao et
al. 2023), block by block, gathered when a block is called and dropped after it. The adapter, its averages and its
optimizer are whole in every process and its gradients averaged: checkpoints, targets and exports stay what they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepdistill.errors import InputError

YES = ("1", "true", "yes", "on")


def asked_for() -> bool:
    """Whether `accelerate launch` asks for FSDP2.

    Raises:
        InputError: it asks for a way of dividing that this trainer does not know.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in YES:
            raise InputError(
                f"accelerate: got {name}, whose engine holds one network and one optimizer; allowed: FSDP2, several "
                "processes with all weights each, or one; see train_scripts/configs/accelerate/"
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in YES:
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise InputError(
            f"accelerate: got FSDP of version {version}; allowed: 2; set fsdp_version: 2, or launch with --config_file "
            "train_scripts/configs/accelerate/fsdp2.yaml"
        )
    return True


def check(lora: bool) -> bool:
    """`asked_for`, for a student of this kind.

    Raises:
        InputError: see there; or the student is no adapter.
    """
    if asked_for() and not lora:
        raise InputError(
            "accelerate: got FSDP2 with --no-lora; allowed: a LoRA, whose frozen weights are divided; leave --no-lora "
            "out, or launch with train_scripts/configs/accelerate/eight_gpus.yaml"
        )
    return asked_for()


@contextmanager
def kept_from_accelerate() -> Iterator[None]:
    """Within, accelerate is not told of FSDP: it would want to divide the adapter and its optimizer too."""
    told = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if told is not None:
            os.environ["ACCELERATE_USE_FSDP"] = told


def divide(backbone: nn.Module, device: torch.device) -> None:
    """Divides the frozen weights of a network among all processes, in place: its blocks each, then what is left.

    A block is what its class calls one (diffusers' `_no_split_modules`). Weights that are trained are left whole. Until
    it is divided the network is whole in every process, so one device must hold it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kinds = set(getattr(backbone, "_no_split_modules", None) or ())
    blocks = [m for m in backbone.modules() if type(m).__name__ in kinds]
    settings = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "ignored_params": {p for p in backbone.parameters() if p.requires_grad},
    }
    for module in (*reversed(blocks), backbone):  # the innermost first
        fully_shard(module, **settings)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Puts the mean over all processes in the place of each gradient, in one exchange for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
