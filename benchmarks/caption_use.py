"""How far LADD's trained discriminators tell captions apart, and real latents from generated ones.

    python benchmarks/caption_use.py --runs out/ladd out/flow-ladd --out out/caption_use.json

A run's last checkpoint judges real latents twice with the same noise, with their own caption and with another sample's.
`captions` is the share that it prefers with their own: 0.5 if the caption has no effect, 1 if it always decides.
`realism` is the share it prefers to the student's latents for the same caption, 0.5 if it cannot tell. Captions of two
samples may both fit an image, so 1 is not quite to be reached. Both have their 95 % interval.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from stepdistill.cli.command import guard, parse
from stepdistill.conditioning.base import expand
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.evaluation.records import write_record
from stepdistill.methods.base import Batch, Clock
from stepdistill.training import checkpoint
from stepdistill.training.ladd import LADDConfig
from stepdistill.training.run import open_samples, open_teacher
from stepdistill.training.trainer import build_models
from stepdistill.typed import built, read_yaml


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/caption_use.py."""

    runs: tuple[Path, ...]
    """Folders of finished LADD runs."""
    n: int = 1000
    """Samples of the training data."""
    seed: int = 1
    """Seed of times and noise."""
    out: Path | None = None
    """JSON file for the figures."""


@torch.no_grad()
def judged(run: Path, n: int, seed: int) -> dict[str, object]:
    """Returns the shares of one run, and where its discriminator looks.

    Raises:
        InputError: the folder holds no run of LADD, no checkpoint, or too few samples.
    """
    record = read_yaml(run / "config.json", "runs")
    names = {field.name for field in fields(LADDConfig)}
    if not (isinstance(record, dict) and names <= record.keys()):
        raise InputError(f"runs: got {run}, which is no run of LADD; allowed: a folder that train_ladd.py wrote")
    config = built(LADDConfig, {key: value for key, value in record.items() if key in names}, str(run))
    if (found := checkpoint.load_latest(run / "checkpoints")) is None:
        raise InputError(f"runs: got {run}, which has no checkpoint; allowed: a folder that train_ladd.py wrote")
    update, state = found
    method, teacher = config.method(), open_teacher(config, torch.device("cpu"))
    data = open_samples(config, teacher, run)
    if len(data) < 2 * n:
        raise InputError(f"n: got {n}; allowed: 1 to {len(data) // 2}, half of the samples of {run}")
    models = build_models(method, teacher, config, method.networks(teacher))
    for role, group in models.trained.items():
        for name, weight in group.items():
            weight.copy_(state["trained"][role][name])
    for name, buffer in models.discriminator.named_buffers():
        buffer.copy_(state["buffers"]["discriminator"][name])
    models.discriminator.eval()  # spectral norms are those of the checkpoint
    clock, uncond = Clock(update, update), expand(data.uncond, 1)

    def logits(index: int, caption: int) -> tuple[float, float]:
        """Mean logits of a real latent, and of a generated one, for a caption."""
        x0, _ = data.batch([index])
        _, cond = data.batch([caption])
        terms = method.loss("discriminator", Batch(x0, cond, uncond, Draws.at(seed, index, 1)), models, clock).terms
        return terms["real_logits"].item(), terms["fake_logits"].item()

    own = [logits(i, i) for i in range(n)]
    other = [logits(i, i + n) for i in range(n)]
    captions = sum(real > swapped for (real, _), (swapped, _) in zip(own, other, strict=True)) / n
    realism = sum(real > fake for real, fake in own) / n
    return {
        "run": str(run), "teacher": config.teacher, "update": update, "logit_mean": config.logit_mean,
        "captions": captions, "realism": realism,
        "plus_minus": {k: round(1.96 * math.sqrt(v * (1 - v) / n), 4)
                       for k, v in (("captions", captions), ("realism", realism))},
    }  # fmt: skip


def main(config: Config) -> None:
    """Measures the runs, prints a line for each, and writes the figures."""
    figures = []
    for run in config.runs:
        figures.append(judged(run, config.n, config.seed))
        print(
            "{run}: prefers the own caption in {captions:.1%}, the real latent in {realism:.1%}".format(**figures[-1]),
            flush=True,
        )
    if config.out is not None:
        what = "share of real latents that LADD's discriminator prefers with their own caption, and to generated ones"
        write_record(config.out, {"what": what, "n": config.n, "seed": config.seed, "figures": figures})


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
