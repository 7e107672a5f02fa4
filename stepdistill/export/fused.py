"""A LoRA student folded into its teacher's weights: a whole pipeline folder that needs no adapter."""

from __future__ import annotations

import json
from pathlib import Path

from stepdistill.denoiser.load import open_pipeline
from stepdistill.errors import InputError
from stepdistill.export.kohya import read_lora
from stepdistill.training.checkpoint import replacing


def save_fused(folder: Path, out: Path, *, teacher: str) -> Path:
    """Writes the pipeline W + (alpha / rank) B A for every adapted W, with the student's own scheduler.

    Args:
        folder: the export folder of a LoRA student. teacher: the pipeline it was trained from.

    Raises:
        InputError: no LoRA there, one that is not of this teacher, or the disk is full.
    """
    import diffusers

    folder = Path(folder)
    state, _ = read_lora(folder)
    pipeline = open_pipeline(teacher)
    if not hasattr(pipeline, "load_lora_weights"):
        raise InputError(
            f"teacher: got {type(pipeline).__name__}, which takes no LoRA; allowed: a text-to-image pipeline"
        )
    try:
        pipeline.load_lora_weights(str(folder))
        loaded = sum(".lora_" in name for name, _ in pipeline.unet.named_parameters())
        if loaded != len(state):
            raise ValueError(f"{loaded} of {len(state)} tensors fit")
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"teacher: got {teacher}, for which {folder} was not trained ({reason}); allowed: its own; give it with "
            "--teacher"
        ) from error
    pipeline.fuse_lora(safe_fusing=True)
    pipeline.unload_lora_weights()
    config = folder / "scheduler" / "scheduler_config.json"
    if config.is_file():
        kind = getattr(diffusers, json.loads(config.read_text())["_class_name"])
        pipeline.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    with replacing(Path(out)) as new:
        pipeline.save_pretrained(new)
    return Path(out)
