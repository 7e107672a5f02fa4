"""How much the harness adds: our generation / (NFE x one denoiser forward + decode), all measured in the same run.

    python benchmarks/sampling_speed.py --steps 1 4 8 --batch 8 --out benchmarks/results/sampling_speed.json

Generation is what the benchmark does: `Sampler` on a plain pipeline with the text already encoded, to uint8 pictures.
The parts are timed in the same rounds, by turns, so that a busy machine slows all alike. The goal is 1.05 at most for
batches of 8 and more.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill.cli._run import guard, parse
from stepdistill.cli.bench import device_of
from stepdistill.errors import InputError
from stepdistill.evaluation import models, records, spec
from stepdistill.evaluation.generate import Sampler, backbone


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/sampling_speed.py."""

    model: str = "avatars,scheduler=ddim"
    """A model SPEC."""
    steps: tuple[int, ...] = (1, 4, 8)
    """Step counts."""
    batch: int = 8
    """Pictures drawn at a time."""
    rounds: int = 9
    """Rounds; each times generation and its parts once."""
    guidance: float | None = None
    """In place of the SPEC's."""
    prompt: str = "a picture of two people"
    """For every picture."""
    seed: int = 0
    """Of the initial noise."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    out: Path | None = None
    """JSON file for the figures."""


def parts(
    sampler: Sampler, condition: dict[str, Any], *, steps: int, batch: int
) -> tuple[int, Callable[[], None], Callable[[], None]]:
    """What generation must do: how often it calls the network, and the calls of the network and of the decoder by
    themselves, with the very tensors that generation gives them."""
    pipeline, network = sampler.pipeline, backbone(sampler.pipeline)
    calls: list[tuple[tuple, dict]] = []
    decoded: list[tuple[tuple, dict]] = []
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    decode = pipeline.vae.decode if getattr(pipeline, "vae", None) is not None else None
    if decode is not None:
        pipeline.vae.decode = lambda *args, **kwargs: decoded.append((args, kwargs)) or decode(*args, **kwargs)
    try:
        sampler(condition, first=0, count=batch, steps=steps)
    finally:
        hook.remove()
        if decode is not None:
            del pipeline.vae.decode

    def forwards() -> None:
        for args, kwargs in calls:
            network(*args, **kwargs)

    def decodes() -> None:
        for args, kwargs in decoded:
            decode(*args, **kwargs)

    return len(calls), forwards, decodes


@torch.no_grad()
def compare(sampler: Sampler, prompt: str, *, steps: int, batch: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds, in ms, and the median of the rounds' ratios with its spread.

    Returns:
        generation_ms, forward_ms (one call of the network), calls, decode_ms, ratio, ratio_low, ratio_high (quartiles).
    """
    condition = sampler.encode([prompt] * batch)
    calls, forwards, decodes = parts(sampler, condition, steps=steps, batch=batch)

    def generation() -> None:
        sampler(condition, first=0, count=batch, steps=steps)

    jobs = {"generation": generation, "forwards": forwards, "decodes": decodes}
    taken = by_turns(jobs, rounds, backbone(sampler.pipeline).device)
    ratios = [g / (f + d) for g, f, d in zip(*taken.values(), strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "generation_ms": statistics.median(taken["generation"]),
        "forward_ms": statistics.median(taken["forwards"]) / calls,
        "calls": calls,
        "decode_ms": statistics.median(taken["decodes"]),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def by_turns(jobs: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """The ms of each job in each round, after one round that is not timed; every second round goes backwards."""
    for job in jobs.values():
        job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds):
        for name in list(jobs) if i % 2 == 0 else list(reversed(jobs)):
            taken[name].append(_milliseconds(jobs[name], device))
    return taken


def _milliseconds(job: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def main(config: Config) -> None:
    """Measures, prints a line a step count, and writes the figures."""
    if config.rounds < 2 or config.batch < 1:
        raise InputError(
            f"got rounds={config.rounds}, batch={config.batch}; allowed: 2 or more rounds, 1 or more pictures"
        )
    device = device_of(config.device)
    model = spec.parse(config.model)
    pipeline = models.load(model, device=device)
    guidance = config.guidance if config.guidance is not None else models.guidance_of(model, pipeline, 3.0)
    sampler = Sampler(pipeline, guidance, config.seed)
    figures = []
    for steps in config.steps:
        found = compare(sampler, config.prompt, steps=steps, batch=config.batch, rounds=config.rounds)
        figures.append({"steps": steps, **{k: round(v, 4) for k, v in found.items()}})
        print(
            f"{steps:>3} steps, batch {config.batch}: {found['generation_ms']:.1f} ms, {found['calls']} x forward "
            f"{found['forward_ms']:.1f} ms + decode {found['decode_ms']:.1f} ms: ratio {found['ratio']:.3f} "
            f"({found['ratio_low']:.3f} to {found['ratio_high']:.3f})"
        )
    if config.out is not None:
        record = {
            "what": "generation / (calls x forward + decode)", "goal": 1.05, "model": config.model,
            "guidance": guidance,
            "batch": config.batch, "rounds": config.rounds, "seed": config.seed, "figures": figures,
            "dtype": str(backbone(pipeline).dtype).removeprefix("torch."), 
            "device": records.device_name(device),
            "commit": records.commit(), "versions": records.versions(),
            "command": " ".join(map(shlex.quote, sys.argv)),
        }  # fmt: skip
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
