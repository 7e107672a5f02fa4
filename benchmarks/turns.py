"""Timing of jobs that take turns, so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def by_turns(jobs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Returns the ms of each job in each round, after an untimed round; every second round is in reverse order."""
    for job in jobs.values():
        job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds):
        for name in list(jobs) if i % 2 == 0 else list(reversed(jobs)):
            taken[name].append(_milliseconds(jobs[name], device))
    return taken


def _milliseconds(job: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)
