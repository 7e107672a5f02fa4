"""An export's folder: the names of its files, where a run keeps it, and the record of how it was made."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

ADAPTER = "default"  # the name of a student's adapter in peft
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"


def export_in(folder: str) -> str:
    """Returns the export in a training run's folder, which is none itself; anything else unchanged."""
    place = Path(folder).expanduser()

    def whole(where: Path) -> bool:
        return any((where / name).is_file() for name in (LORA_FILE, PEFT_FILE, "model_index.json"))

    with contextlib.suppress(OSError):  # an unreadable folder is reported when it is loaded
        if not whole(place) and whole(place / "export"):
            return str(place / "export")
    return str(place) if folder.startswith("~") else folder


def read_record(file: Path) -> dict:
    """Returns the content of an export's config.json; empty if it cannot be read or is no record."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def trained_steps(lora: str | None) -> int | None:
    """Returns the step count that a progressive student was distilled for; None for others and for what is no export
    on disk."""
    count = None if lora is None else read_record(Path(export_in(lora)) / "config.json").get("end_steps")
    return count if isinstance(count, int) else None


def chain_in(folder: Path) -> list[str]:
    """Returns the names of the exports of a progressive chain in its run's folder, fewest steps first."""
    found = sorted(int(n) for export in folder.glob("steps-*") if (n := export.name[6:]).isdigit())
    return [f"steps-{steps}" for steps in found]


def missing(folder: Path) -> str:
    """Returns why a folder holds no LoRA, and what to give instead: the end of an error's line."""
    if chain := chain_in(folder):
        return f"a chain of students; allowed: one of {', '.join(chain)}; give {folder / chain[0]}"
    if (folder / "model_index.json").is_file() or (folder / "export" / "model_index.json").is_file():
        return "a whole pipeline; allowed: a LoRA; give the folder as the model itself"
    if (folder / "checkpoints").is_dir():
        return "which holds no export; allowed: a run that has ended; run its command again"
    return "which holds no .safetensors file; allowed: the folder of a run, or the export in it"
