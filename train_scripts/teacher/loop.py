"""Common to all stages of the embedded teacher's training: budget, loop, checkpoint, images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from stepdistill.data import avatars
from stepdistill.errors import InputError
from stepdistill.files import sync, write

Figures = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Where and how the stages run.

    Attributes:
        out: folder for checkpoints and results. seed: of weights and batches. device: where to train.
        checkpoint_every: updates between checkpoints. plan: the stage's section of the configuration.
    """

    out: Path
    seed: int = 0
    device: str = "cpu"
    checkpoint_every: int = 1000
    plan: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """Length, batch size and optimizer settings of a stage."""

    updates: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 200
    decay: float = 0.25
    """Share of the updates, at the end, over which the learning rate falls to zero."""
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0


def learning_rate_at(update: int, budget: Budget) -> float:
    """Warm-up, plateau, linear decay to zero; the plateau can be extended without restarting."""
    rise = min(1.0, (update + 1) / budget.warmup)
    fall = min(1.0, (budget.updates - update) / max(1.0, budget.decay * budget.updates))
    return budget.learning_rate * min(rise, fall)


def _identity(run: Run) -> str:
    """What must match for a checkpoint to be resumed: plan and seed, except for the length of the stage."""
    budget = {k: v for k, v in run.plan.get("budget", {}).items() if k not in ("updates", "decay")}
    return json.dumps([run.seed, run.plan | {"budget": budget}], sort_keys=True)


def _save(path: Path, tensors: dict[str, Tensor], run: Run) -> None:
    """Writes a checkpoint beside the last one, then replaces that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, beside, {"plan": _identity(run)})
    sync(beside)
    beside.replace(path)


def _load(path: Path, run: Run) -> dict[str, Tensor] | None:
    """The checkpoint at `path`; None if there is none.

    Raises:
        InputError: it is broken, or has another plan or seed.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            plan = (file.metadata() or {}).get("plan")
        saved = load_file(path, device=run.device)
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint: got {path}, which is broken ({str(error)[:60]}); remove it") from error
    if plan != _identity(run):
        raise InputError(f"--out: got {path} of another plan or seed; allowed: the same, to resume; give another --out")
    return saved


def train(
    name: str, model: nn.Module, loss: Callable[[torch.Generator], Tensor], budget: Budget, run: Run
) -> dict[str, Tensor]:
    """Runs one stage to its end and returns the averaged weights.

    `loss` draws its own batch from the generator it is given, which is seeded by the update, so a resumed run sees
    the same batches. Weights, averages and optimizer state go to `<out>/checkpoints/<name>.safetensors`.
    """
    path = run.out / "checkpoints" / f"{name}.safetensors"
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        named.values(), lr=0.0, betas=budget.betas, weight_decay=budget.weight_decay, fused=True
    )
    averages = {key: parameter.detach().clone() for key, parameter in named.items()}
    buffers = dict(model.named_buffers())
    first, running = 0, torch.zeros((), device=run.device)  # running: the smoothed loss
    if (saved := _load(path, run)) is not None:
        first, running = int(saved["update"]), saved["running"]
        for key, parameter in named.items():
            parameter.data.copy_(saved[f"model.{key}"])
            averages[key].copy_(saved[f"average.{key}"])
            optimizer.state[parameter] = {
                part: saved[f"{part}.{key}"].cpu() if part == "step" else saved[f"{part}.{key}"]
                for part in ("step", "exp_avg", "exp_avg_sq")
            }
        for key, buffer in buffers.items():
            buffer.copy_(saved[f"buffer.{key}"])

    def save(update: int) -> None:
        tensors = {"update": torch.tensor(update), "running": running}
        for key, parameter in named.items():
            tensors[f"model.{key}"], tensors[f"average.{key}"] = parameter.data, averages[key]
            tensors |= {f"{part}.{key}": value for part, value in optimizer.state[parameter].items()}
        tensors |= {f"buffer.{key}": buffer for key, buffer in buffers.items()}
        _save(path, tensors, run)

    model.train()
    # On a CPU the fused kernel's backward takes a third of an update of the small UNet.
    attention = partial(sdpa_kernel, SDPBackend.MATH) if run.device == "cpu" else nullcontext
    log = run.out / f"{name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    write(log, "".join(json.dumps(line) + "\n" for line in lines if line["update"] <= first))
    bar = tqdm(range(first, budget.updates), name, initial=first, total=budget.updates, dynamic_ncols=True)
    for update in bar:
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + update)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(update, budget)
        with torch.autocast(torch.device(run.device).type, torch.bfloat16), attention():
            value = loss(generator)
        value.backward()
        nn.utils.clip_grad_norm_(named.values(), budget.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(budget.ema_decay, (update + 1) / (update + 10))
        torch._foreach_lerp_(list(averages.values()), [p.data for p in named.values()], 1 - decay)
        running.lerp_(value.detach().float(), 1.0 if update == 0 else 0.02)
        last = update + 1 == budget.updates
        if (update + 1) % 100 == 0 or last:
            level = running.item()
            if not math.isfinite(level):
                raise InputError(f"{name}: loss is {level} at update {update + 1}; lower its learning_rate")
            bar.set_postfix(loss=f"{level:.4f}")
            with log.open("a") as file:
                file.write(json.dumps({"update": update + 1, "loss": round(level, 6)}) + "\n")
        if (update + 1) % run.checkpoint_every == 0 or last:
            save(update + 1)
    return averages


def last_loss(run: Run, name: str) -> float:
    """The last smoothed loss in a stage's log."""
    return json.loads((run.out / f"{name}.jsonl").read_text().splitlines()[-1])["loss"]


def images_of(split: str, device: str) -> Tensor:
    """The split's images, (N, 3, 32, 32) uint8."""
    return torch.from_numpy(avatars.load(split).images).permute(0, 3, 1, 2).contiguous().to(device)


def to_unit(images: Tensor) -> Tensor:
    """Converts uint8 images to floats in [-1, 1]."""
    return images.float().div(127.5).sub(1)
