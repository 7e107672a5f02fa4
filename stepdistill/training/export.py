"""From a finished run to the export folder."""

from __future__ import annotations

import io
from pathlib import Path

from stepdistill.denoiser.load import Teacher
from stepdistill.export.card import model_card
from stepdistill.export.lora import lcm_scheduler, save_lora, save_pipeline
from stepdistill.methods.base import Method
from stepdistill.training.config import TrainConfig
from stepdistill.training.roles import Models
from stepdistill.training.validation import grid, prompts_for

SHOWN = ("max_train_steps", "batch_size", "gradient_accumulation", "learning_rate", "rank", "alpha", "target_ema", "seed", "data")


def export(method: Method, teacher: Teacher, models: Models, config: TrainConfig, out: Path, captions: list[str]) -> Path:
    """Writes the student: a LoRA folder or a whole pipeline, with scheduler, card, grid and configuration."""
    scheduler = lcm_scheduler(teacher, solver_steps=method.solver_steps, timestep_scaling=method.timestep_scaling)
    record = config.record()
    picture = io.BytesIO()
    grid(teacher, models.student, config, captions).save(picture, "png")
    card = model_card(
        method="lcm", teacher=config.teacher, out=str(out), scheduler=type(scheduler).__name__, lora=config.lora,
        prompt=prompts_for(config, captions)[0], settings={k: record[k] for k in SHOWN}, grid="grid.png",
    )  # fmt: skip
    common = {"scheduler": scheduler, "config": record, "card": card, "extra": {"grid.png": picture.getvalue()}}
    if config.lora:
        return save_lora(teacher, out, **common)
    return save_pipeline(teacher, models.student.backbone, out, **common)
