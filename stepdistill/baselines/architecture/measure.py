"""Measurements of a UNet: held-out errors, milliseconds per call and, by the benchmark's harness, its images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.baselines.architecture.unets import Samples, around, conditions, noised
from stepdistill.baselines.base import Batch
from stepdistill.baselines.reduce import masked_mean
from stepdistill.conditioning.base import take, to
from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.evaluation.spec import ModelSpec

BATCH = 32
METRICS = ("fd", "clip", "attributes")


def held_batches(held: Samples, device: torch.device, seed: int = 0) -> list[Batch]:
    """The held-out samples with noise and times that are the same for every network."""
    batches = []
    for first in range(0, len(held), BATCH):
        count = min(BATCH, len(held) - first)
        items = to(held.batch(list(range(first, first + count))), device)
        batches.append(Batch(items, Draws.at(seed, first, count, device)))
    return batches


@torch.no_grad()
def held_out(teacher: Denoiser, unet: nn.Module, held: Samples) -> dict[str, float]:
    """Mean squared errors at uniformly drawn times, in the network's prediction type: `denoising_loss` against the
    target from the data, `distance_to_teacher` against the teacher's output."""
    student, device = around(teacher, unet), next(unet.parameters()).device
    task = distance = 0.0
    for batch in held_batches(held, device):
        x_t, t, target = noised(batch["x0"], batch.draws, teacher.schedule, teacher.kind)
        cond = conditions(batch, "cond")
        own, theirs = (network.raw(x_t, t, cond) for network in (student, teacher))
        task += len(x_t) * masked_mean((own - target).square()).item()
        distance += len(x_t) * masked_mean((own - theirs).square()).item()
    return {"denoising_loss": task / len(held), "distance_to_teacher": distance / len(held)}


@torch.no_grad()
def call_times(teacher: Denoiser, unet: nn.Module, held: Samples, repeats: int = 20) -> list[float]:
    """The milliseconds of calls with one sample, in ascending order."""
    network, device = around(teacher, unet), next(unet.parameters()).device
    batch = held_batches(held, device)[0]
    x, cond, times = batch["x0"][:1], take(conditions(batch, "cond"), slice(1)), []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        network.raw(x, teacher.schedule.t_max, cond).sum().item()  # waits for the device
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times[2:])


def pictures(
    models: Mapping[str, ModelSpec], out: Path, *, protocol: str, n: int, steps: Sequence[int], floor: bool = False
) -> dict[tuple[str, int], dict[str, float]]:
    """By model and step count: Fréchet distance, attribute accuracy (or CLIP score), each with the ends of its interval
    as NAME_low and NAME_high, and milliseconds per image. The benchmark's rows are kept in `out`.

    Args:
        floor: also measure real and reconstructed images.

    Raises:
        InputError: a model cannot be measured; or see `suite.evaluate`.
    """
    from stepdistill.evaluation.protocols import load_protocol
    from stepdistill.evaluation.suite import Settings, evaluate

    known = load_protocol(protocol)
    known = dataclasses.replace(known, n=n, metrics=tuple(m for m in METRICS if m in known.metrics))
    results = evaluate(models, known, steps, out=out, settings=Settings(latency_repeats=5, floor=floor))
    if results.failed:
        failure = results.failed[0]
        raise InputError(f"pictures: got {failure.model}, which could not be measured: {failure.reason}")
    return {(row["model"], row["steps"]): _figures(row) for row in results.rows}


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    adherence = "attribute_accuracy" if row.get("attribute_accuracy") is not None else "clip_score"  # prompt adherence
    figures: dict[str, float] = {}
    for name in ("fd", adherence):
        if row.get(name) is not None:
            measured = row["metrics"][name]
            figures |= {name: row[name], f"{name}_low": measured["low"], f"{name}_high": measured["high"]}
    return figures | ({"picture_ms": row["latency_ms"]["total_p50"]} if row.get("latency_ms") else {})
