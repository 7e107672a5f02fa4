"""Converts a student: plain diffusers, one file under kohya's names, or fused into its teacher's weights.

    stepdistill export out/student --format kohya       # one .safetensors for ComfyUI, A1111, InvokeAI
    stepdistill export out/student --format fused       # a whole pipeline folder, no adapter to load

The folder is that of a training run, or its `export`. Existing files are never overwritten.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stepdistill.errors import InputError


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill export`."""

    folder: tyro.conf.Positional[Path]
    """The training run's folder, or the export in it."""
    format: Annotated[Literal["diffusers", "kohya", "fused"], tyro.conf.arg(name="format")] = "diffusers"
    """diffusers: a folder for load_lora_weights; kohya: one file; fused: a whole pipeline folder."""
    out: Path | None = None
    """Output path; default: next to the folder, with the format in its name."""
    teacher: str | None = None
    """The pipeline the student was trained from; default: the one in its config.json, with its variant and revision."""


def main(config: Config) -> int:
    """Writes the student in another format and prints the path."""
    folder = find_export(config.folder)
    whole = (folder / "model_index.json").is_file()
    if whole and config.format != "diffusers":
        raise InputError(
            f"--format: got {config.format} for {folder}, a whole pipeline; allowed: diffusers; it needs no LoRA and "
            "nothing fused"
        )
    out = config.out or beside(folder, config.format)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"--out: got {out}, which is there already; allowed: a new path; give another")
    if config.format == "kohya":
        from stepdistill.export.kohya import save_kohya, usage

        print(save_kohya(folder, out))
        print(usage(folder), file=sys.stderr)
        return 0
    if config.format == "fused":
        from stepdistill.export.fused import save_fused

        print(save_fused(folder, out, **({"teacher": config.teacher} if config.teacher else trained_from(folder))))
        return 0
    from stepdistill.export.kohya import read_lora
    from stepdistill.files import replacing

    if not whole:
        read_lora(folder)  # checks that it is complete, with rank and alpha
    with replacing(out) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
    print(out)
    return 0


def find_export(folder: Path) -> Path:
    """Returns the export folder, given a run's folder or the export itself.

    Raises:
        InputError: there is none.
    """
    from stepdistill.export.folder import LORA_FILE, PEFT_FILE, chain_in, export_in, missing

    folder = Path(folder)
    place = Path(export_in(str(folder)))
    if any((place / name).is_file() for name in (LORA_FILE, PEFT_FILE, "model_index.json")):
        return place
    if (folder / "checkpoints").is_dir():
        raise InputError(
            f"folder: got {folder}, a run that has not ended; allowed: one with an export; run its command again"
        )
    if chain_in(folder):
        raise InputError(f"folder: got {folder}, {missing(folder)}")
    what = "which holds no export" if folder.exists() else "which does not exist"
    raise InputError(f"folder: got {folder}, {what}; allowed: a training run's folder or its export; check the path")


def beside(folder: Path, form: str) -> Path:
    """run/export -> run/export-fused, run/export-kohya.safetensors."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}-{form}{'.safetensors' if form == 'kohya' else ''}")


def trained_from(folder: Path) -> dict[str, str | None]:
    """Returns the teacher named by an export's config.json, with its variant and revision.

    Raises:
        InputError: it names none.
    """
    try:
        record = json.loads((folder / "config.json").read_text())
        return {"teacher": str(record["teacher"])} | {name: record.get(name) for name in ("variant", "revision")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"teacher: got no config.json that names it in {folder}; allowed: a pipeline; give it with --teacher"
        ) from error
