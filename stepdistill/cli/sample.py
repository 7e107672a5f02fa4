"""Generates a grid of images: one row per prompt, one column per noise sample.

    stepdistill sample --model avatars,lora=out/student --prompt "a red hat" --steps 4 --out grid.png

The model is a SPEC: path[,lora=DIR][,scheduler=lcm][,guidance=1.5]; see stepdistill --help. The same seed gives each
column the same noise for any model, so that grids of two models can be compared.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tyro

from stepdistill.errors import InputError, check_seed


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill sample`."""

    model: str = "avatars"
    """SPEC of the model."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt; repeat for more rows."""
    prompts: Path | None = None
    """A text file of prompts, one per line."""
    steps: int | None = None
    """Sampling steps; default: those that a progressive student is for; else 4, or a ready model's own if it does not
    support 4."""
    count: int = 4
    """Images per prompt."""
    guidance: float | None = None
    """Guidance scale; 1 means none. Default: the SPEC's, else a student's own, else the pipeline's."""
    seed: int = 0
    """Seed of the noise; column i has seed + i."""
    batch: int | None = None
    """Images per batch; by default at most 16, fewer for larger ones."""
    size: int | None = None
    """Side of the images in pixels; default: the model's own."""
    out: Path = Path("grid.png")
    """The image file to write."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dry_run: bool = False
    """Print what would be generated, and exit."""


def main(config: Config) -> int:
    """Generates the grid, writes it and its configuration, and prints its path."""
    prompts = prompts_of(config)
    least = {"steps": 1 if config.steps is None else config.steps, "count": config.count}
    least |= {name: value for name in ("batch", "size") if (value := getattr(config, name)) is not None}
    for name, value in least.items():
        if value < 1:
            raise InputError(f"{name}: got {value}; allowed: 1 or more; try 4")
    check_seed(config.seed)
    if config.guidance is not None and not 1 <= config.guidance < math.inf:
        raise InputError(f"guidance: got {config.guidance:g}; allowed: 1 (none) or more; try 2")
    if config.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--out: got {config.out}; allowed: a .png, .jpg or .webp; name one")
    from stepdistill.cli.bench import device_of
    from stepdistill.denoiser.families import drawn_size, even_sigmas
    from stepdistill.evaluation import models, places
    from stepdistill.evaluation.settings import Settings
    from stepdistill.evaluation.spec import parse
    from stepdistill.export.folder import trained_steps
    from stepdistill.quiet import quiet
    from stepdistill.training.validation import tile

    spec, device = parse(config.model), device_of(config.device)
    own = (trained_steps(spec.lora) or 4,) if not spec.steps else spec.steps
    steps = config.steps or (4 if 4 in own else own[-1])
    spec = spec.at(steps)
    if config.guidance is not None:
        spec = dataclasses.replace(spec, guidance=config.guidance)
    places.check(spec, remote=not config.dry_run)
    if config.dry_run:
        print(f"would generate {len(prompts)} x {config.count} images in {steps} steps with {spec}: {config.out}")
        return 0
    pipeline = models.load(spec, device=device)
    guidance = models.guidance_of(spec, pipeline)
    with quiet():
        call = models.call_of(spec, pipeline)
        call |= {"sigmas": even_sigmas(steps)} if models.even_of(spec, pipeline) else {}
        side = config.size or call.get("height") or drawn_size(pipeline)
        batch = config.batch or min(16, Settings().batch_of(side))
        pictures = draw(pipeline, prompts, dataclasses.replace(config, steps=steps, batch=batch), guidance, call)
    grid = tile([pictures[i : i + config.count] for i in range(0, len(pictures), config.count)])
    record = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    record |= {"prompt": prompts, "steps": steps, "guidance": guidance, "device": device}
    record["scheduler"] = type(pipeline.scheduler).__name__
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        grid.save(config.out)
        config.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--out: got {config.out} ({error.strerror}); allowed: a path that can be written") from error
    print(config.out)
    return 0


def prompts_of(config: Config) -> list[str]:
    """Returns the prompts of a command line.

    Raises:
        InputError: there are none, or the file cannot be read.
    """
    prompts = [prompt for prompt in config.prompt if prompt.strip()]
    if config.prompts is not None:
        from stepdistill.data.sources import read_prompts

        prompts += read_prompts(config.prompts)
    if not prompts:
        raise InputError('prompt: got none; allowed: one or more; give --prompt "…" or --prompts FILE')
    return prompts


def draw(
    pipeline, prompts: list[str], config: Config, guidance: float, call: Mapping[str, Any] = MappingProxyType({})
) -> list:
    """Generates `config.count` images per prompt, in order; image i of a prompt starts from the noise of seed + i.

    `call` holds further arguments of the pipeline.
    """
    import torch
    from tqdm import tqdm

    from stepdistill.evaluation.generate import step_options

    jobs = [(prompt, config.seed + i) for prompt in prompts for i in range(config.count)]
    common = step_options(pipeline, config.steps, call) | {"guidance_scale": guidance}
    common |= {} if config.size is None else {"height": config.size, "width": config.size}
    pictures = []
    with tqdm(total=len(jobs), desc=f"{config.steps} steps", unit="img", dynamic_ncols=True) as bar:
        for first in range(0, len(jobs), config.batch):
            batch = jobs[first : first + config.batch]
            generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
            try:
                pictures += pipeline([prompt for prompt, _ in batch], generator=generators, **common).images
            except (TypeError, ValueError) as error:
                reason = " ".join(str(error).split())[:160]
                raise InputError(
                    f"model: got {config.model}, which does not draw that ({reason}); allowed: a text-to-image "
                    "pipeline, with steps and size it takes"
                ) from error
            bar.update(len(batch))
    return pictures
