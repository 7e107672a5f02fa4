"""From a finished run to the export folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image

from stepdistill import embedded, files
from stepdistill.denoiser.families import drawn_size, needs_sigmas
from stepdistill.denoiser.load import Teacher, find
from stepdistill.errors import InputError
from stepdistill.export.card import model_card
from stepdistill.export.lora import save_lora, save_pipeline
from stepdistill.methods.base import Method
from stepdistill.provenance import commit
from stepdistill.training.config import TrainConfig
from stepdistill.training.roles import Models
from stepdistill.training.validation import prompts_for

SHOWN = ("max_train_steps", "batch_size", "gradient_accumulation", "learning_rate", "target_ema", "seed", "data")
OF_A_LORA = ("rank", "alpha")


def export(
    method: Method, teacher: Teacher, models: Models, config: TrainConfig, out: Path, captions: list[str],
    seconds: float, picture: Image.Image | None,
) -> Path:  # fmt: skip
    """Writes the student: a LoRA folder or a whole pipeline, with scheduler, card, grid and configuration.

    The `seconds` of training go into config.json, where the benchmark finds them.

    Args:
        picture: the validation grid; None if there is none.
    """
    scheduler = method.scheduler(teacher)
    name = f"{method.name}-lora" if config.lora else method.name
    stamp = method.stamp(models)
    record = config.record() | stamp | {"method": name, "train_seconds": round(seconds, 1), "commit": commit()}
    if even := needs_sigmas(teacher.source, scheduler):
        record["sigmas"] = "even"
    height, side = teacher.image_size
    if other := height == side != drawn_size(teacher.source):
        record["resolution"] = side  # also where the data set it
    extra = {}
    if picture is not None:
        picture.save(png := io.BytesIO(), "png")
        extra["grid.png"] = png.getvalue()
    card = model_card(
        method=name, teacher=config.teacher, out=str(out), scheduler=type(scheduler).__name__, lora=config.lora,
        prompt=None if teacher.vae is None else prompts_for(config, captions)[0],
        guidance=method.guidance_scale(models.student), steps=method.steps, even=even,
        settings=shown(record, config.lora) | stamp, grid="grid.png" if extra else None, side=side if other else None,
        base=find(config.teacher) if config.teacher in embedded.TEACHERS else config.teacher,
        peft_part=None if hasattr(teacher.source, "load_lora_weights") else teacher.part,
        classes=teacher.denoiser.classes, shape=teacher.sample_shape, variant=config.variant,
        dtype=str(config.half_type or torch.float32).removeprefix("torch."),
    )  # fmt: skip
    common = {"scheduler": scheduler, "config": record, "card": card, "extra": extra}
    if config.lora:
        return save_lora(teacher, out, **common)
    return save_pipeline(teacher, models.student.backbone, out, **common)


def shown(record: dict, lora: bool) -> dict:
    """The training settings shown on a model card: those of a run's record that apply to it."""
    return {name: record[name] for name in (*SHOWN, *(OF_A_LORA if lora else ())) if name in record}


def push_rest(config: TrainConfig, export: Path) -> None:
    """Uploads a finished run's export folder if that is requested and not done yet.

    Raises:
        InputError: see `push`. The same command retries.
    """
    file = Path(config.out) / "done.json"
    done = json.loads(file.read_text())
    if config.dry_run or config.push_to_hub in (None, done.get("pushed")):
        return
    push(export, config.push_to_hub)
    files.write(file, json.dumps(done | {"pushed": config.push_to_hub}) + "\n")


def push(folder: Path, repository: str) -> None:
    """Uploads an export folder to a hub repository, which is created if missing; the card there loads from there.

    Raises:
        InputError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
        card = (Path(folder) / "README.md").read_text().replace(f'"{folder}"', f'"{repository}"')
        api.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except Exception as error:  # the hub and the network raise many kinds
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"push_to_hub: got {repository}, which could not be uploaded to ({reason[:120]}); the export is whole in "
            f"{folder}; check `hf auth login` and run the same command again, which uploads it alone"
        ) from error
