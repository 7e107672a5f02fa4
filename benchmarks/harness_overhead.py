"""Overhead of a benchmark: (generating + storing) / (NFE x one denoiser forward + decode), measured in one run.

    python benchmarks/harness_overhead.py --out benchmarks/results/harness_overhead.json

The timed work is that of `stepdistill bench` for the images of a cell: the plain pipeline generates every batch from
its own noise, network evaluations are counted, and the images are written as PNG files with their hashes, including the
wait for the last one. Prompts are encoded once for all step counts, so this ratio leaves their encoding out; another,
"with text, for one step count", adds it to the generation, as if a series had this cell alone. The parts take turns in
the same rounds, so that a busy machine slows all alike. The goal is at most 1.05 for batches of 8 or more, without
text. The plain pipeline's call is timed too: its overhead is diffusers', and any harness that calls it has it.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from turns import by_turns, median_interval

from stepdistill.cli.bench import device_of
from stepdistill.cli.command import guard, parse
from stepdistill.errors import InputError
from stepdistill.evaluation import models, records, spec
from stepdistill.evaluation.generate import Sampler, Series, backbone
from stepdistill.evaluation.pictures import Cell, Store
from stepdistill.evaluation.sets import open_set


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/harness_overhead.py."""

    model: str = "avatars,scheduler=ddim"
    """A model SPEC."""
    prompts: str = "avatars:test"
    """Set of prompts: avatars:test, a folder with captions, or a .txt file."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Step counts."""
    batch: tuple[int, ...] = (8, 32)
    """Batch sizes."""
    n: int = 64
    """Images per cell, a multiple of each batch size. A cell's own cost, such as the wait until its last batch is
    written, counts for more than in a benchmark, whose cells have 1,000 images and more."""
    rounds: int = 7
    """Rounds, at least; each times a cell and its parts once."""
    seconds: float = 90
    """Seconds for each batch size and step count. Cells of few steps are short and get more rounds: a fixed cost counts
    most there, and so does a neighbour's burst."""
    guidance: float | None = None
    """Guidance scale; overrides the SPEC's."""
    seed: int = 0
    """Seed of the initial noise."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    out: Path | None = None
    """JSON file for the figures."""


def parts(
    sampler: Sampler, condition: dict[str, Any], *, steps: int, batch: int
) -> tuple[int, Callable[[], None], Callable[[], None]]:
    """Returns the necessary parts of generation: the number of network calls, and functions that repeat only the
    network's and only the decoder's calls, with the same tensors as in generation."""
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
def compare(series: Series, *, steps: int, rounds: int, seconds: float, folder: Path) -> dict[str, float]:
    """Returns medians over the rounds, in ms per batch, and the median of the rounds' ratios with its 95 % interval.

    ratio is the time of generation over that of the networks; ratio_with_text the same with the prompts' encoding added
    to the generation; ratio_pipeline the plain pipeline's call over the networks.

    Args:
        folder: for the images. They are never read.
    """
    sampler, batch = series.sampler, series.batch
    batches, numbers = series.n // batch, itertools.count()
    condition = sampler.encode(series.prompts[:batch])
    calls, forwards, decodes = parts(sampler, condition, steps=steps, batch=batch)

    def cell() -> None:
        with Store() as store, Cell(store, folder / f"{steps}-{next(numbers)}", {}, series.n) as kept:
            for first in range(0, series.n, batch):
                kept.keep(first, series.draw(steps, first, batch))

    def times(part):
        return lambda: [part() for _ in range(batches)]

    jobs = {
        "cell": cell, "forwards": times(forwards), "decodes": times(decodes),
        "pipeline": times(lambda: sampler(condition, first=0, count=batch, steps=steps)),
        "text": times(lambda: sampler.encode(series.prompts[:batch])),
    }  # fmt: skip
    taken = by_turns(jobs, rounds, backbone(sampler.pipeline).device, seconds)
    networks = [f + d for f, d in zip(taken["forwards"], taken["decodes"], strict=True)]
    ratios = [c / parts for c, parts in zip(taken["cell"], networks, strict=True)]
    whole = [(c + t) / parts for c, t, parts in zip(taken["cell"], taken["text"], networks, strict=True)]
    plain = [p / parts for p, parts in zip(taken["pipeline"], networks, strict=True)]
    low, high = median_interval(ratios)
    ms = {name: statistics.median(values) / batches for name, values in taken.items()}
    return {
        "generation_ms": ms["cell"], "forward_ms": ms["forwards"] / calls, "calls": calls, "decode_ms": ms["decodes"],
        "text_ms": ms["text"], "ratio": statistics.median(ratios), "ratio_low": low, "ratio_high": high,
        "ratio_with_text": statistics.median(whole), "ratio_pipeline": statistics.median(plain), "rounds": len(ratios),
    }  # fmt: skip


def main(config: Config) -> None:
    """Measures, prints a line per batch size and step count, and writes the figures."""
    if config.rounds < 2 or any(batch < 1 or config.n < batch or config.n % batch for batch in config.batch):
        raise InputError(
            f"got rounds={config.rounds}, batch={config.batch}, n={config.n}; allowed: 2 or more rounds, whole batches"
        )
    device = device_of(config.device)
    model = spec.parse(config.model)
    pipeline = models.load(model, device=device)
    guidance = config.guidance if config.guidance is not None else models.guidance_of(model, pipeline, 3.0)
    prompts = open_set(config.prompts).prompts
    if prompts is None or len(prompts) < config.n:
        raise InputError(f"--prompts: got {len(prompts or ())} in {config.prompts}; allowed: {config.n} or more")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for batch, steps in itertools.product(config.batch, config.steps):
            series = Series(Sampler(pipeline, guidance, config.seed), prompts, config.n, batch)
            place, limits = Path(folder) / str(batch), {"rounds": config.rounds, "seconds": config.seconds}
            found = compare(series, steps=steps, folder=place, **limits)
            figures.append({"batch": batch, "steps": steps, **{k: round(v, 4) for k, v in found.items()}})
            print(
                f"{steps:>3} steps, batch {batch}: {found['generation_ms']:.1f} ms per batch, {found['calls']} x "
                f"forward {found['forward_ms']:.1f} ms + decode {found['decode_ms']:.1f} ms: ratio "
                f"{found['ratio']:.3f} (95 %: {found['ratio_low']:.3f} to {found['ratio_high']:.3f}; "
                f"{found['rounds']} rounds), the plain pipeline {found['ratio_pipeline']:.3f}; "
                f"text {found['text_ms']:.1f} ms, once for all step counts; "
                f"with text, for one step count, {found['ratio_with_text']:.3f}"
            )
    if config.out is not None:
        record = {
            "what": "(drawing + keeping) / (calls x forward + decode)", "goal": 1.05, "model": config.model,
            "guidance": guidance, "n": config.n, "seconds": config.seconds, "seed": config.seed,
            "figures": figures, "dtype": str(backbone(pipeline).dtype).removeprefix("torch."),
        }  # fmt: skip
        records.write_record(config.out, record, device)


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
