"""Encodes pictures and captions once: latents and text embeddings, for any number of training runs.

    stepdistill cache --teacher avatars --data avatars --out out/cache
    stepdistill cache --teacher FOLDER --data prompts.txt --out out/cache --guidance 7.5      # the teacher paints

Give the folder to a training script as --data. A build that was cut off goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stepdistill import embedded
from stepdistill.errors import InputError


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill cache`."""

    out: Path
    """Folder of the cache."""
    data: str | None = None
    """Image folder with metadata.jsonl, `datasets` name, webdataset shards, prompts (.txt), or "avatars"; may be left
    out for an embedded teacher alone."""
    teacher: str = "avatars"
    """Pipeline folder, hub id, or an embedded teacher: "avatars" or "avatars-flow"."""
    variant: str | None = None
    """Of the teacher's weight files, as fp16."""
    revision: str | None = None
    """Of the teacher's hub repository."""
    resolution: int | None = None
    """Side of the pictures in pixels; the teacher's own where not given."""
    limit: int | None = None
    """The first so many samples only."""
    half: bool = False
    """Keep latents and text in float16: half the disk."""
    steps: int = 50
    """For prompts: DDIM steps of the teacher's paintings."""
    guidance: float = 2.0
    """For prompts: guidance scale of the teacher's paintings; 1 is none."""
    seed: int = 0
    """For prompts: seed of the noise."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """For prompts: what the teacher paints in."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dry_run: bool = False
    """Say what would be encoded, and stop."""


def main(config: Config) -> int:
    """Builds the cache and says what it holds."""
    if not config.guidance >= 1:
        raise InputError(f"guidance: got {config.guidance:g}; allowed: 1 (none) or more; try 2")
    if config.steps < 1:
        raise InputError(f"steps: got {config.steps}; allowed: 1 or more; try 50")
    config = dataclasses.replace(config, data=embedded.data_for(config.teacher, config.data))
    from stepdistill.cli.bench import device_of
    from stepdistill.data.build import picture_size
    from stepdistill.data.cache import make_cache
    from stepdistill.data.sources import open_source
    from stepdistill.denoiser.load import load_teacher
    from stepdistill.training.config import HALF

    device = device_of(config.device)
    teacher = load_teacher(config.teacher, variant=config.variant, revision=config.revision, device=device)
    if config.dry_run:
        source = open_source(config.data)
        height, width = picture_size(teacher, config.resolution)
        count = min(len(source), config.limit or len(source))
        verb = "paint" if source.picture is None else "encode"
        distinct = len(set(source.captions[:count]))
        print(f"would {verb} {count} pictures of {width}x{height} and {distinct} distinct captions into {config.out}")
        return 0
    cache = make_cache(
        config.data, teacher, config.out, resolution=config.resolution, seed=config.seed, synthetic_steps=config.steps,
        synthetic_guidance=config.guidance, limit=config.limit, half=config.half,
        precision=HALF[config.mixed_precision],
    )  # fmt: skip
    record = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    (config.out / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    megabytes = sum(file.stat().st_size for file in config.out.iterdir()) / 1e6
    print(f"{config.out}: {len(cache)} samples, {len(set(cache.captions))} distinct captions, {megabytes:.1f} MB")
    return 0
