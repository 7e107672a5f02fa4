"""Trains the embedded teachers and their scorer from scratch, stage by stage, on the embedded avatars.

    python train_scripts/train_teacher.py --out out/teacher              # all stages; run it again to resume
    python train_scripts/train_teacher.py --out out/teacher --stages vae text --config my.yaml

Stages: `vae` (autoencoder), `decoder` (its second half again, on noisy latents), `text` (tokenizer and CLIP text
tower), `unet` (the denoiser), `scorer` (an open_clip model with attribute probes), `flow_text` (two smaller towers),
`flow` (an MMDiT). When all are done, `--out` holds `teacher/`, a StableDiffusionPipeline folder, `flow-teacher/`, a
StableDiffusion3Pipeline folder on the same autoencoder, and `scorer/`; copy them to assets/. The configuration
is train_scripts/configs/avatars_teacher.yaml; the stages are in train_scripts/teacher/.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml
from teacher.autoencoder import run_decoder, run_vae
from teacher.flow import run_flow, run_flow_text
from teacher.loop import Budget, Figures, Run
from teacher.scorer import run_scorer
from teacher.text import run_text
from teacher.unet import run_unet

from stepdistill import files
from stepdistill.cli.command import guard, parse
from stepdistill.errors import InputError
from stepdistill.evaluation import records

STAGES = {
    "vae": run_vae, "decoder": run_decoder, "text": run_text, "unet": run_unet, "scorer": run_scorer,
    "flow_text": run_flow_text, "flow": run_flow,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Trains the embedded teachers."""

    out: Path
    """Folder for checkpoints and results."""
    config: Path = Path(__file__).parent / "configs" / "avatars_teacher.yaml"
    """Sizes and budgets of the stages."""
    stages: tuple[str, ...] = tuple(STAGES)
    """Which stages to run, in this order."""
    seed: int = 0
    """Seed of weights and batches."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    checkpoint_every: int = 1000
    """Updates between checkpoints."""
    dry_run: bool = False
    """Print the plan of the stages and stop."""


def read_plan(config: Config) -> dict[str, dict]:
    """The configuration sections of the requested stages, each with a budget.

    Raises:
        InputError: an unknown stage, or a file that cannot be read, lacks a section, or has a budget of other fields.
    """
    if unknown := set(config.stages) - set(STAGES):
        raise InputError(f"--stages: got {', '.join(sorted(unknown))}; allowed: {', '.join(STAGES)}")
    try:
        plan = yaml.safe_load(config.config.read_text())
        sections = {stage: dict(plan[stage]) for stage in config.stages}
        for section in sections.values():
            Budget(**section["budget"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        allowed = ", ".join(f.name for f in fields(Budget))
        raise InputError(
            f"--config: got {config.config} ({' '.join(str(error).split())[:100]}); allowed: YAML, a section for each "
            f"stage, in it a budget of {allowed}; see train_scripts/configs/avatars_teacher.yaml"
        ) from error
    return sections


def record(run: Run, stage: str, figures: Figures) -> None:
    """Adds a stage to <out>/record.json: its plan, its figures and what produced them."""
    file = run.out / "record.json"
    whole = json.loads(file.read_text()) if file.is_file() else {}
    whole[stage] = {"figures": figures, "plan": run.plan, "seed": run.seed, **records.provenance(run.device)}
    files.write(file, json.dumps(whole, indent=2) + "\n")
    print(f"{stage}: {json.dumps(figures)}")


def main(config: Config) -> None:
    """Runs the requested stages."""
    plan = read_plan(config)
    if config.dry_run:
        print(yaml.safe_dump(plan, sort_keys=False), end="")
        return
    torch.manual_seed(config.seed)
    for stage, section in plan.items():
        run = Run(config.out, config.seed, config.device, config.checkpoint_every, section)
        settings = {key: value for key, value in section.items() if key != "budget"}
        figures = STAGES[stage](run, budget=Budget(**section["budget"]), **settings)
        record(run, stage, figures)


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
