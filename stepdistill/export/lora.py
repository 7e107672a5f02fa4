"""Writes students that load in plain diffusers: a LoRA with its rank and alpha, or a full pipeline."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from stepdistill.denoiser.load import Teacher
from stepdistill.errors import InputError
from stepdistill.export.folder import ADAPTER, LORA_FILE, PEFT_FILE
from stepdistill.files import replacing


def save_lora(
    teacher: Teacher, out: Path, *, scheduler, config: dict, card: str, extra: dict[str, bytes] | None = None
) -> Path:
    """Writes the adapter on the teacher's backbone to an export folder.

    `pytorch_lora_weights.safetensors` holds all adapter tensors in diffusers' format, and the adapter's configuration,
    so that `load_lora_weights` restores rank and alpha. For a pipeline that cannot load a LoRA (PixArt, pixel models) a
    peft folder is written instead, for `peft.PeftModel.from_pretrained(pipe.transformer, out)`.

    Args:
        scheduler: a diffusers scheduler, written to `scheduler/`.
        config: the run's configuration. card: the text of README.md. extra: further files by name.
    """
    from peft.utils import get_peft_model_state_dict

    backbone = teacher.denoiser.backbone
    # peft's own names, lora_A and lora_B, throughout: `convert_state_dict_to_diffusers` renames the attention layers to
    # lora.down and lora.up, and `load_lora_weights` silently drops the renamed ones of such a mixture.
    state = get_peft_model_state_dict(backbone, adapter_name=ADAPTER)
    trained = sum(".lora_" in name for name, _ in backbone.named_parameters())
    if len(state) != trained:
        raise InputError(f"export: got {len(state)} tensors for {trained} trained ones; please report this")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(Path(out)) as folder:
        settings = backbone.peft_config[ADAPTER]
        if hasattr(teacher.source, "save_lora_weights"):
            named = {f"{teacher.part}_lora_layers": state, f"{teacher.part}_lora_adapter_metadata": settings.to_dict()}
            type(teacher.source).save_lora_weights(folder, weight_name=LORA_FILE, **named)
        else:
            save_file({f"base_model.model.{name}": tensor for name, tensor in state.items()}, folder / PEFT_FILE)
            settings.save_pretrained(folder)
        _finish(folder, scheduler, config, card, extra)
    return Path(out)


def save_pipeline(
    teacher: Teacher, backbone, out: Path, *, scheduler, config: dict, card: str, extra: dict[str, bytes] | None = None
) -> Path:
    """Writes a full pipeline folder with the student in place of the teacher.

    A DDIMPipeline is written as a DDPMPipeline, since it would replace the student's scheduler by a DDIMScheduler.
    """
    from diffusers import DDIMPipeline, DDPMPipeline

    kind = DDPMPipeline if isinstance(teacher.source, DDIMPipeline) else type(teacher.source)
    parts = dict(teacher.source.components) | {teacher.part: backbone, "scheduler": scheduler}
    options = {"requires_safety_checker": False} if teacher.family == "StableDiffusionPipeline" else {}
    with replacing(Path(out)) as folder:
        kind(**parts, **options).save_pretrained(folder)
        _finish(folder, scheduler, config, card, extra)
    return Path(out)


def _finish(folder: Path, scheduler, config: dict, card: str, extra: dict[str, bytes] | None) -> None:
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(card)
    for name, content in (extra or {}).items():
        (folder / name).write_bytes(content)
