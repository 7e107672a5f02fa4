"""Weights sharded over the processes: FSDP2.

    accelerate launch --config_file train_scripts/configs/accelerate/fsdp2.yaml train_scripts/train_ladd.py ...

torch's `fully_shard` (Zhao et al. 2023) shards weights block by block, gathers them when a block is called and frees
them after it. For a LoRA, only the frozen network under it is sharded; the adapter, its averages and its optimizer are
replicated in every process, and its gradients are averaged. For a full student everything is sharded: its weights,
gradients, averages and optimizer, and the teacher. Checkpoints and exports hold full tensors either way, so a run can
resume on more processes or fewer, sharded or not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from stepdistill.training.config import TrainConfig

YES = ("1", "true", "yes", "on")


def asked_for() -> bool:
    """Whether `accelerate launch` requests FSDP2.

    Raises:
        InputError: it requests a kind of sharding that this trainer does not support.
    """
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "").lower() in YES:
        raise InputError(
            "accelerate: got MEGATRON_LM; allowed: FSDP2, DeepSpeed, several processes with all weights each, or one; "
            "see train_scripts/configs/accelerate/"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in YES:
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise InputError(
            f"accelerate: got FSDP of version {version}; allowed: 2; set fsdp_version: 2, or launch with --config_file "
            "train_scripts/configs/accelerate/fsdp2.yaml"
        )
    return True


def check(config: TrainConfig) -> bool:
    """`asked_for`, with a check of the configuration. To be called before networks are loaded: for FSDP, transformers
    would give text encoders their weights in one process of a machine only.

    Raises:
        InputError: see there; or a full student's optimizer or precision does not support sharded weights.
    """
    if not asked_for():
        return False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not config.lora:
        for name, bad, fix in (("optimizer", "adamw8bit", "adamw"), ("mixed_precision", "fp16", "bf16 or no")):
            if getattr(config, name) == bad:
                raise InputError(f"{name}: got {bad} for a full student under FSDP2; allowed there: {fix}; or a LoRA")
    return True


@contextmanager
def kept_from_accelerate() -> Iterator[None]:
    """Context that hides FSDP and DeepSpeed from accelerate: FSDP would shard the adapter and its optimizer too, and of
    DeepSpeed it knows a single engine."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    hidden_variables = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden_variables)


def divide(backbone: nn.Module, device: torch.device, *, adapted: bool) -> None:
    """Shards the weights of a network over all processes, in place: each of its blocks, then the rest.

    Blocks are those that its class names (diffusers' `_no_split_modules`); of nested ones (in a UNet) the innermost. An
    outer one's own weights would be freed after its forward, and gradients that enter inside it, as LADD's do, would
    not gather them again. A network on the CPU moves to the device block by block, and need never be there as a whole.

    Args:
        adapted: the trained weights are an adapter's, and are not sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kinds = set(getattr(backbone, "_no_split_modules", None) or ())
    blocks = [m for m in backbone.modules() if type(m).__name__ in kinds]
    blocks = [m for m in blocks if not any(c is not m and type(c).__name__ in kinds for c in m.modules())]
    settings = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "ignored_params": {p for p in backbone.parameters() if adapted and p.requires_grad},
    }
    for module in blocks:
        fully_shard(module, **settings)
    # The rest of a trained network is freed after a call, too: the next one may have averages swapped in. That of a
    # frozen one stays, since gradients may reach it through its blocks alone, without passing through its output.
    trained = not adapted and any(p.requires_grad for p in backbone.parameters())
    fully_shard(backbone, reshard_after_forward=True if trained else None, **settings)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces each gradient by its mean over all processes, in one all-reduce per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def own(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece, in every process; all must call it. The tensor itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tree: object, keep: bool) -> object:
    """Nested dictionaries and lists with every sharded tensor gathered on the CPU. All processes must call it.

    Args:
        keep: whether this process gets them; the others get None in their places.
    """
    if isinstance(tree, DTensor):
        full = whole(tree)
        return full.detach().cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gather(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [gather(value, keep) for value in tree]
    return tree


def like(full: Tensor, tensor: Tensor) -> Tensor:
    """A full tensor, which every process has, sharded like another tensor."""
    if not isinstance(tensor, DTensor):
        return full
    on_device = full.to(tensor.device)
    return distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)


def spread(state: dict[int, dict], parameters: list[nn.Parameter]) -> None:
    """Replaces an optimizer's full moments, by parameter index, with ones sharded like their parameters."""
    for number, moments in state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.ndim:  # not the step count
                moments[name] = like(value, parameters[number])


def gathered(backbone: nn.Module, keep: bool) -> nn.Module | None:
    """A copy of a sharded network with its full weights, on the CPU. All processes must call it.

    Args:
        keep: whether this process gets it; the others get None.
    """
    from accelerate import init_empty_weights

    weights = gather(backbone.state_dict(), keep)
    if not keep:
        return None
    with init_empty_weights(include_buffers=False):
        copied = type(backbone).from_config(backbone.config)
    copied.load_state_dict(weights, assign=True)
    return copied
