"""Fuses a LoRA student into its teacher's weights: a full pipeline folder that needs no adapter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from stepdistill.denoiser.load import open_pipeline
from stepdistill.errors import InputError
from stepdistill.export.adapters import load_whole
from stepdistill.export.kohya import read_lora
from stepdistill.files import replacing


def save_fused(
    folder: Path, out: Path, *, teacher: str, variant: str | None = None, revision: str | None = None
) -> Path:
    """Writes the pipeline, W + (alpha / rank) B A for every adapted W, with the student's scheduler, config and card.

    Args:
        folder: the export folder of a LoRA student. teacher: the pipeline it was trained from. variant,
            revision: of the teacher, see open_pipeline.

    Raises:
        InputError: there is no LoRA, it does not fit this teacher, or the disk is full.
    """
    import diffusers

    folder = Path(folder)
    read_lora(folder)  # checks that it is complete, with rank and alpha
    pipeline = open_pipeline(teacher, variant=variant, revision=revision)
    try:
        load_whole(pipeline, folder, fuse=True)
    except InputError as error:
        reason = str(error).removeprefix(f"lora: got {folder}, ")[:120]
        raise InputError(
            f"teacher: got {teacher}, for which {folder} was not trained ({reason}); allowed: its own; give it with "
            "--teacher"
        ) from error
    config = folder / "scheduler" / "scheduler_config.json"
    if config.is_file():
        kind = getattr(diffusers, json.loads(config.read_text())["_class_name"])
        pipeline.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    with replacing(Path(out)) as new:
        pipeline.save_pretrained(new)
        for name in ("config.json", "grid.png"):
            if (folder / name).is_file():
                shutil.copy(folder / name, new)
        if (folder / "README.md").is_file():
            (new / "README.md").write_text(fused_card((folder / "README.md").read_text(), str(out)))
    return Path(out)


def fused_card(card: str, out: str) -> str:
    """Turns the card of a LoRA into that of the fused pipeline, which loads without an adapter."""
    load = "pipe = DiffusionPipeline.from_pretrained("
    card = re.sub(rf'(?m)^{re.escape(load)}"[^"]*"', lambda _: f'{load}"{out}"', card)
    files = re.compile(r', (variant|revision)="[^"]*"')
    card = re.sub(rf"(?m)^{re.escape(load)}.*$", lambda found: files.sub("", found[0]), card)
    card = re.sub(r"(?m)^(from peft|pipe\.(load_lora_weights\(|scheduler = |\w+ = PeftModel)).*\n", "", card)
    card = re.sub(r"(?m)^(from diffusers import DiffusionPipeline), \w+$", r"\1", card)
    card = re.sub(r"(?m)^(# \S+) LoRA of ", r"\1 LoRA fused into ", card)
    return card.replace("\n- lora\n", "\n", 1)
