"""Loads a LoRA into a pipeline whole, or not at all."""

from __future__ import annotations

import warnings
from pathlib import Path

from stepdistill.errors import InputError
from stepdistill.evaluation.progress import quiet


def load_whole(pipeline, lora: str | Path) -> int:
    """Loads the LoRA of a folder, a .safetensors file or a hub id into a pipeline that has none; returns its tensors.

    diffusers passes over tensors whose names it does not know, and says no word. So those that arrive are counted
    against those of the file, once its own conversions have given them one name for each tensor: a kohya file's alphas
    are settings, not tensors, and a text encoder's are counted like the denoiser's.

    Raises:
        InputError: the file cannot be read, does not fit the pipeline, or fits it in part.
    """
    path = Path(lora)
    source = {"pretrained_model_name_or_path_or_dict": str(path.parent if path.is_file() else lora)}
    if path.is_file():
        source["weight_name"] = path.name
    backbone = getattr(pipeline, "unet", None)
    fit = {"unet_config": backbone.config} if backbone is not None else {}
    try:
        with quiet(), warnings.catch_warnings():  # what diffusers and peft would mutter is counted below
            warnings.simplefilter("ignore")
            stored = pipeline.lora_state_dict(**source, **fit, use_safetensors=True)
            pipeline.load_lora_weights(**source, use_safetensors=True)
    except Exception as error:  # files, keys, shapes and the hub each raise their own kinds
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"lora: got {lora}, which could not be loaded ({reason}); was it trained for this pipeline?"
        ) from error
    names = stored[0] if isinstance(stored, tuple) else stored
    held = sum(not name.endswith(".alpha") for name in names)
    loaded = count(pipeline)
    if loaded != held:
        what = "of which no tensor fits" if not loaded else f"of which {loaded} of {held} tensors fit"
        raise InputError(
            f"lora: got {lora}, {what} this pipeline; allowed: all; was it trained for another one, or do its names "
            "mix two formats?"
        )
    return loaded


def count(pipeline) -> int:
    """How many LoRA tensors the modules of a pipeline hold."""
    modules = [part for part in pipeline.components.values() if hasattr(part, "named_parameters")]
    return sum(".lora_" in name for module in modules for name, _ in module.named_parameters())
