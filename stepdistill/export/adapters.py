"""Loads a LoRA into a pipeline, completely or not at all, and its tensors, for training that starts from it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.export.folder import LORA_FILE, PEFT_FILE, missing
from stepdistill.quiet import collected


def load_whole(pipeline, lora: str | Path, *, fuse: bool = False) -> int:
    """Loads the LoRA of a folder, .safetensors file or hub id into a pipeline without one; returns its tensor count.

    diffusers silently skips tensors whose names it does not know. The loaded tensors are therefore counted and compared
    with those of the file after diffusers' conversion, which gives each tensor one name: a kohya file's alphas are
    settings, not tensors, and a text encoder's tensors are counted like the denoiser's.

    Args:
        fuse: merge it into the pipeline's weights, so that no adapter is left.

    Raises:
        InputError: the file cannot be read, does not fit the pipeline, or fits it only in part.
    """
    path = Path(lora)
    if (path / "adapter_config.json").is_file():
        return _load_with_peft(pipeline, path, fuse)
    if not hasattr(pipeline, "load_lora_weights"):
        raise InputError(
            f"lora: got {lora} for a {type(pipeline).__name__}, which loads none; allowed: a folder of peft's, with "
            "adapter_config.json"
        )
    source = {"pretrained_model_name_or_path_or_dict": str(path.parent if path.is_file() else lora)}
    if path.is_file():
        source["weight_name"] = path.name
    backbone = getattr(pipeline, "unet", None)
    fit = {"unet_config": backbone.config} if backbone is not None else {}
    try:
        with collected(), warnings.catch_warnings():  # what diffusers and peft would warn of is counted below
            warnings.simplefilter("ignore")
            stored = pipeline.lora_state_dict(**source, **fit, use_safetensors=True)
            pipeline.load_lora_weights(**source, use_safetensors=True)
    except Exception as error:  # files, keys, shapes and the hub each raise their own types
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
    if fuse:
        pipeline.fuse_lora(safe_fusing=True)
        pipeline.unload_lora_weights()
    return loaded


def _load_with_peft(pipeline, folder: Path, fuse: bool) -> int:
    """Loads a peft folder into the pipeline's network, whose layers peft wraps in place."""
    from peft import PeftModel

    part = "transformer" if getattr(pipeline, "transformer", None) is not None else "unet"
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            held = len(file.keys())
        with collected():
            adapted = PeftModel.from_pretrained(getattr(pipeline, part), str(folder))
    except Exception as error:  # files, keys and shapes each raise their own types
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"lora: got {folder}, which could not be loaded ({reason}); was it trained for this pipeline?"
        ) from error
    setattr(pipeline, part, adapted.base_model.model)
    if (loaded := count(pipeline)) != held:
        raise InputError(f"lora: got {folder}, of which {loaded} of {held} tensors fit this pipeline; allowed: all")
    if fuse:
        setattr(pipeline, part, adapted.merge_and_unload(safe_merge=True))
    return loaded


def count(pipeline) -> int:
    """Returns the number of LoRA tensors in a pipeline's modules."""
    modules = [part for part in pipeline.components.values() if hasattr(part, "named_parameters")]
    return sum(".lora_" in name for module in modules for name, _ in module.named_parameters())


def trained_weights(folder: Path, adapter: str = "default") -> dict[str, Tensor]:
    """Returns the tensors of an export's LoRA under the network's parameter names, for training to start from.

    Raises:
        InputError: the folder holds no readable LoRA.
    """
    file = next((file for name in (LORA_FILE, PEFT_FILE) if (file := Path(folder) / name).is_file()), None)
    if file is None:
        raise InputError(f"lora: got {folder}, {missing(Path(folder))}")
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"lora: got {file}, which cannot be read ({str(error)[:80]}); make the export again"
        ) from error
    prefix = r"^(base_model\.model|unet|transformer)\."
    return {
        re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{adapter}.weight", re.sub(prefix, "", name)): tensor
        for name, tensor in stored.items()
    }
