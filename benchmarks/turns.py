"""Timing of jobs that take turns, so that a busy machine slows all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch


def by_turns(
    jobs: dict[str, Callable[[], object]], rounds: int, device: torch.device, seconds: float = 0
) -> dict[str, list[float]]:
    """Returns the ms of each job in each round, after an untimed round; every second round is in reverse order.

    Args:
        rounds: the least number. seconds: further rounds are added until they have taken this long.
    """
    for job in jobs.values():
        job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < seconds:
        for name in list(jobs) if done % 2 == 0 else list(reversed(jobs)):
            taken[name].append(_milliseconds(jobs[name], device))
        done += 1
    return taken


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns a 95 % interval of the median of independent values, whatever their distribution: the k-th smallest and
    the k-th largest, with the largest k for which Binomial(n, 1/2) is below k with a probability of 2.5 % at most.
    Below 6 values no k is enough, and the smallest and the largest are returned."""
    ordered, below, k = sorted(values), 0.0, 0
    while (below := below + math.comb(len(ordered), k) / 2 ** len(ordered)) <= 0.025:
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[-k]


def _milliseconds(job: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)
