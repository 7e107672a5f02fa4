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
