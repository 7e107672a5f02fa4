"""Encodes images and captions once: latents and text embeddings, for any number of training runs.

    stepdistill cache --teacher avatars --data avatars --out out/cache
    stepdistill cache --teacher FOLDER --data prompts.txt --out out/cache --guidance 7.5      # generates images

Pass the folder to a training script as --data. An interrupted build resumes where it stopped. Several GPUs share the
work of either:

    accelerate launch --multi_gpu --num_processes 8 -m stepdistill cache --teacher FOLDER --data DATA --out out/cache
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stepdistill import embedded
from stepdistill.errors import InputError, check_seed

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill cache`."""

    out: Path
    """Folder of the cache."""
    data: str | None = None
    """Image folder with metadata.jsonl, `datasets` name, webdataset shards, prompts (.txt), or "avatars"; optional for
    an embedded teacher."""
    teacher: str = "avatars"
    """Pipeline folder, hub id, or an embedded teacher: "avatars" or "avatars-flow"."""
    variant: str | None = None
    """Variant of the teacher's weight files, such as fp16."""
    revision: str | None = None
    """Revision of the teacher's hub repository."""
    resolution: int | None = None
    """Side of the images in pixels; default: the teacher's own."""
    limit: int | None = None
    """Number of samples to use, from the first; default: all."""
    half: bool = False
    """Store latents and text in float16, in half the disk space."""
    steps: int = 50
    """For prompts: DDIM steps of the teacher's images."""
    guidance: float | None = None
    """For prompts: guidance scale of the teacher's images, which the training's has to equal; 1 means none."""
    seed: int = 0
    """For prompts: seed of the noise."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """For prompts: precision in which the teacher generates."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dry_run: bool = False
    """Print what would be encoded, and exit."""


def open_teacher(config: Config, device: str, *, paints: bool) -> Teacher:
    """Loads the teacher. Its network is on the device only if it generates the images, in bfloat16 if it does so in
    bfloat16, as in a run; else it is the least that the pipeline loads with: half of its weights' size, on the CPU."""
    import torch

    from stepdistill.denoiser.load import load_teacher, move_coders

    half = torch.bfloat16 if config.mixed_precision == "bf16" or not paints else None
    files = {"variant": config.variant, "revision": config.revision}
    teacher = load_teacher(config.teacher, **files, backbone_dtype=half, device=device if paints else "cpu")
    move_coders(teacher, device)
    return teacher


def main(config: Config) -> int:
    """Builds the cache and prints what it holds."""
    check_seed(config.seed)
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit: got {config.limit}; allowed: 1 or more; leave it out for all")
    if config.guidance is not None and not 1 <= config.guidance < math.inf:
        raise InputError(f"guidance: got {config.guidance:g}; allowed: 1 (none) or more; try 2")
    if config.steps < 1:
        raise InputError(f"steps: got {config.steps}; allowed: 1 or more; try 50")
    config = dataclasses.replace(config, data=embedded.data_for(config.teacher, config.data))
    from stepdistill.cli.bench import device_of
    from stepdistill.data.build import picture_size
    from stepdistill.data.cache import make_cache
    from stepdistill.data.sources import open_source
    from stepdistill.processes import Processes
    from stepdistill.training.config import HALF

    device, source = device_of(config.device), open_source(config.data)
    if source.picture is None and config.guidance is None:
        raise InputError(
            f"guidance: got none for {config.data}, whose images the teacher generates; allowed: that of the training, "
            "by default 8 for LCM-LoRA and 4 for the other methods; give --guidance"
        )
    team = Processes.found(device)
    teacher = open_teacher(config, device, paints=source.picture is None)
    if config.dry_run:
        height, width = picture_size(teacher, config.resolution)
        count = min(len(source), config.limit or len(source))
        verb = "generate" if source.picture is None else "encode"
        distinct = len(set(source.captions[:count]))
        if team.main:
            print(f"would {verb} {count} images of {width}x{height} and {distinct} distinct captions into {config.out}")
        return 0
    cache = make_cache(
        config.data, teacher, config.out, resolution=config.resolution, seed=config.seed, synthetic_steps=config.steps,
        synthetic_guidance=1.0 if config.guidance is None else config.guidance, limit=config.limit, half=config.half,
        precision=HALF[config.mixed_precision], team=team,
    )  # fmt: skip
    if not team.main:
        return 0
    record = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    (config.out / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    megabytes = sum(file.stat().st_size for file in config.out.iterdir()) / 1e6
    print(f"{config.out}: {len(cache)} samples, {len(set(cache.captions))} distinct captions, {megabytes:.1f} MB")
    return 0
