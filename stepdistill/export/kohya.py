"""Converts a LoRA export to one file under kohya's names, for ComfyUI, A1111, SD.Next, InvokeAI and sd-scripts.

diffusers' own conversion makes the names; the alpha of each layer, which that conversion sets to the rank, is restored
from the adapter's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.export.folder import LORA_FILE, PEFT_FILE, read_record
from stepdistill.files import disk_full

METADATA = "lora_adapter_metadata"
RECORD = "stepdistill"  # the run's record, in the header of a kohya file


def read_lora(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Returns the tensors and the adapter's configuration of an export.

    Raises:
        InputError: there is no LoRA, it is damaged, or it lacks the adapter's configuration.
    """
    folder = Path(folder)
    file = next((folder / name for name in (LORA_FILE, PEFT_FILE) if (folder / name).is_file()), None)
    if file is None:
        raise InputError(
            f"LoRA: got {folder}, which holds no {LORA_FILE}; allowed: the export folder of a LoRA student"
        )
    try:
        with safe_open(file, "pt") as stored:
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dictionary)
            settings = json.loads((stored.metadata() or {}).get(METADATA, "{}"))
        if file.name == PEFT_FILE:
            own = json.loads((folder / "adapter_config.json").read_text())
            settings = {f"base_model.{key}": value for key, value in own.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"LoRA: got {file}, which is broken ({str(error)[:60]}); export it again") from error
    part = next(iter(state), "").partition(".")[0]
    own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
    if not {"r", "lora_alpha"} <= own.keys():
        raise InputError(
            f"LoRA: got {file} without its rank and alpha; allowed: an export of stepdistill; export it again"
        )
    return state, own


def kohya_record(file: Path) -> dict[str, object]:
    """Returns the run's record from the header of a kohya file; empty if there is none."""
    try:
        with safe_open(file, "pt") as stored:
            record = json.loads((stored.metadata() or {}).get(RECORD, "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def to_kohya(state: dict[str, Tensor], settings: dict[str, object]) -> dict[str, Tensor]:
    """Returns tensors under kohya's names: lora_down and lora_up of each layer, and its alpha (scale = alpha / rank).

    Args:
        state: `unet.<layer>.lora_A.weight` and `unet.<layer>.lora_B.weight`.
        settings: the adapter's configuration; `alpha_pattern` lists layers with another alpha.
    """
    from diffusers.utils import convert_state_dict_to_kohya

    out = {name: tensor.contiguous() for name, tensor in convert_state_dict_to_kohya(dict(state)).items()}
    end = ".lora_A.weight"
    layers = [name.removeprefix("unet.").removesuffix(end) for name in state if name.endswith(end)]
    patterns: dict[str, float] = settings.get("alpha_pattern") or {}
    scaled = settings.get("use_rslora")
    for layer in layers:
        alpha = next((v for k, v in patterns.items() if layer == k or layer.endswith(f".{k}")), settings["lora_alpha"])
        rank = len(state[f"unet.{layer}.lora_A.weight"])
        name = f"lora_unet_{layer.replace('.', '_')}.alpha"
        if name not in out:
            raise InputError(f"kohya: got layer {layer}, whose name diffusers does not convert; please report this")
        out[name] = torch.tensor(float(alpha) * (rank**0.5 if scaled else 1.0))
    return out


def save_kohya(folder: Path, out: Path) -> Path:
    """Writes the LoRA of an export folder as one .safetensors file under kohya's names, with the run's config.

    Raises:
        InputError: see `read_lora`; or the LoRA is of a transformer, or the disk is full.
    """
    state, settings = read_lora(folder)
    if not all(name.startswith("unet.") for name in state):
        raise InputError(
            f"kohya: got {folder}, a LoRA of a transformer; allowed: one of a UNet; ComfyUI reads {LORA_FILE} as it is"
        )
    out = Path(out)
    beside = out.with_name(f".{out.name}.new")
    header = {
        "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(settings["r"]),
        "ss_network_alpha": str(settings["lora_alpha"]), "modelspec.title": out.stem,
    }  # fmt: skip
    if (record := Path(folder) / "config.json").is_file():
        header[RECORD] = record.read_text()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(to_kohya(state, settings), beside, metadata=header)
        beside.rename(out)
    except (OSError, SafetensorError) as error:
        if disk_full(error):
            raise InputError(f"disk: got no space left while writing {out}; free some and run it again") from error
        raise
    finally:
        beside.unlink(missing_ok=True)
    return out


def usage(folder: Path) -> str:
    """Returns how a kohya file of this export is to be sampled, in a line: the file itself cannot say it to the tools
    that read it."""
    record = read_record(Path(folder) / "config.json")
    try:
        config = json.loads((Path(folder) / "scheduler" / "scheduler_config.json").read_text())
    except (OSError, ValueError):
        config = {}
    parts = [f"sampler {str(config.get('_class_name', 'of the card')).removesuffix('Scheduler')}"]
    steps = record.get("end_steps")
    parts += [f"{steps} steps"] if steps else []
    parts.append("CFG 1, as guidance is distilled in")
    if config.get("prediction_type", "epsilon") != "epsilon":
        parts.append(f"prediction type {config['prediction_type']}, which has to be set beside the LoRA")
    return "use with: " + "; ".join(parts)
