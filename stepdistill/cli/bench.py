"""Measures models at several step counts: Frechet distance, CLIP score, attribute accuracy, latency by stage, NFE.

    stepdistill bench --model teacher=avatars,scheduler=ddim --model student=avatars,lora=out/lcm --out out/bench

Every model sees the same prompts and the same noise. Rows go to results.jsonl as they are made: the same command takes
up an interrupted run where it stopped, and measures only what is new. report.md and report.html come at the end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from stepdistill.errors import InputError


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill bench`."""

    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A model, as SPEC or NAME=SPEC; once for each. A SPEC is path[,lora=DIR][,scheduler=..][,guidance=..]."""
    protocol: str = "avatars-2k"
    """A protocol by name, or a .yaml file."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    """Step counts."""
    out: Path = Path("out/bench")
    """Folder for results.jsonl, the grids and the report."""
    n: int | None = None
    """Pictures a cell, in place of the protocol's; it makes another protocol, with another hash."""
    seed: int | None = None
    """Seed of the pictures' noise, in place of the protocol's."""
    batch: int = 64
    """Pictures drawn at a time."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    latency_batch: int = 1
    """Pictures in a timed call."""
    latency_repeats: int = 10
    """Timed calls; 0 leaves latency out."""
    floor: bool = True
    """Measure held-out real pictures and the autoencoder's reconstructions too."""
    card: bool = False
    """Write the figures into the model cards of export folders among the models."""
    dry_run: bool = False
    """Say what would be measured, and stop."""


def main(config: Config) -> int:
    """Runs the benchmark; 1 where a cell failed."""
    from stepdistill.evaluation import protocols, spec, suite

    models, steps = spec.as_models(config.model), suite.check_steps(config.steps)
    protocol = protocols.load_protocol(config.protocol)
    if config.n is not None:
        protocol = dataclasses.replace(protocol, n=config.n)
    if config.dry_run:
        print(f"{protocol.name}: {protocol.n} pictures a cell, {len(models) * len(steps)} cells, into {config.out}")
        for name, model in models.items():
            print(f"  {name}: {model} at {' '.join(map(str, steps))} steps")
        return 0
    device = device_of(config.device)
    settings = suite.Settings(
        batch=config.batch,
        device=device,
        latency_batch=config.latency_batch,
        latency_repeats=config.latency_repeats,
        floor=config.floor,
    )
    results = suite.evaluate(models, protocol, steps, out=config.out, seed=config.seed, settings=settings)
    resolved = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()} | {
        "device": device
    }
    (config.out / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")
    if results.rows:
        from stepdistill.evaluation.report import write_report
        from stepdistill.evaluation.summary import print_table

        print_table(results.rows)
        if config.card:
            from stepdistill.evaluation.cards import write_cards

            for folder in write_cards(results.rows):
                print(f"card: {folder / 'README.md'}")
        print(f"report: {write_report(config.out)}")
    for failure in results.failed:
        at = f" at {failure.steps} steps" if failure.steps else ""
        print(f"failed: {failure.model}{at}: {failure.reason}", file=sys.stderr)
    return 1 if results.failed else 0


def device_of(name: str) -> str:
    """cpu or cuda, from what was asked for.

    Raises:
        InputError: a GPU is asked for where there is none, or the name is no device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device: got {name!r}; allowed: auto, cpu, cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device: got {name}, and this machine has no usable GPU; take cpu")
    return name
