"""What a classifier is measured by."""

from __future__ import annotations

import time

import torch
from torch import nn

from stepdistill.baselines.classifier.data import Labelled, normalise


@torch.no_grad()
def measure(network: nn.Module, held: Labelled, batch: int = 250) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood in nats, and median latency of a single image in milliseconds."""
    device = next(network.parameters()).device
    right, nll = 0, 0.0
    for start in range(0, len(held), batch):
        labels = held.labels[start : start + batch].to(device)
        logits = network(normalise(held.pixels[start : start + batch].to(device))).float()
        right += (logits.argmax(-1) == labels).sum().item()
        nll += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    one, times = normalise(held.pixels[:1].to(device)), []
    for _ in range(20):
        started = time.perf_counter()
        network(one).sum().item()  # waits for the device
        times.append(1000 * (time.perf_counter() - started))
    return {"accuracy": right / len(held), "nll": nll / len(held), "latency_ms": sorted(times)[len(times) // 2]}
