"""A run's folder: which run it belongs to, and whether that is finished.

config.json      the run's resolved flags           checkpoints/     the last two
metrics.jsonl    a line every few updates           validation/      grids
export/          the student                        done.json        written last
wandb.json       the run's id there, if it is tracked
"""

from __future__ import annotations

import json
from pathlib import Path

from stepdistill import files
from stepdistill.errors import InputError
from stepdistill.training.config import LoopConfig

MARK = "samples_per_update"  # in every run's config.json, and in no other


def claim(config: LoopConfig, processes: int = 1, write: bool = True) -> None:
    """Claims the folder for a run: writes config.json, or checks that the existing one is of this run.

    A folder whose run never logged anything, for instance because a flag was rejected, may be claimed.

    Settings that only split the work (batch size, accumulation, processes) may change if their product does not and the
    configuration lists them in FREE.

    Raises:
        InputError: the folder holds another run or a foreign config.json, or cannot be written.
    """
    path = Path(config.out) / "config.json"
    record = config.record()
    record[MARK] = config.batch_size * config.gradient_accumulation * processes
    if path.exists() and MARK not in (there := _read(path)):
        raise InputError(
            f"--out: got {config.out}, whose config.json is no training run's; allowed: a new folder, or a run's; give "
            "another --out"
        )
    if path.exists() and any((path.parent / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        free = config.FREE | ({"max_train_steps"} if config.extendable else set())
        for key in record:
            if key not in free and there.get(key, record[key]) != record[key]:
                got = f"{config.out}, which holds a run with {key} = {there[key]} (now {record[key]})"
                raise InputError(f"--out: got {got}; allowed: the same settings, to resume it; give another --out")
    if not write:
        files.check_place(path.parent)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"--out: got {config.out} ({error.strerror}); allowed: a folder that can be written"
        ) from error


def finished(config: LoopConfig, export: Path | None = None) -> Path | None:
    """The export folder (default `<out>/export`) if it exists and the run reached `max_train_steps`; else None."""
    done, export = Path(config.out) / "done.json", export or Path(config.out) / "export"
    if not done.exists() or not export.is_dir():
        return None
    return export if _read(done).get("update", 0) >= config.max_train_steps else None


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise InputError(
            f"--out: got {path}, which cannot be read; allowed: what a run wrote; remove it, or give another --out"
        )
    return content
