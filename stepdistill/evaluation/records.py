"""A benchmark's records: results.jsonl, one row per cell, written atomically, and the grids next to it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import files
from stepdistill.errors import InputError
from stepdistill.evaluation import arrays
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.protocols import OMITTED, flat
from stepdistill.provenance import provenance

KEY = ("protocol_hash", "model", "weights", "steps", "guidance", "seed")
TIMES = ("timing", "latency_ms", "latency_ms_batch", "pipeline_memory_mb")  # fields of a row with a separate key
FIELDS = (
    "protocol", "protocol_hash", "settings", "model", "method", "teacher", "spec", "weights", "setup",
    "steps", "nfe", "guidance", "scheduler", "spacing", "sigmas", "call", "n", "seed",
    "fd", "fd_low", "fd_high", "fd_extractor", "fd_features", "clip_score", "clip_model", "attribute_accuracy",
    "metrics", *TIMES, "batch", "channels_last", "dtype", "device", "versions", "commit", "command", "train_seconds",
    "train_seed", "train_settings", "train_commit",
)  # fmt: skip
FOREIGN = ("config.json", "model_index.json", "manifest.json", "metrics.jsonl", "checkpoints", "export")
TILE, LARGE = 96, 384  # pixels: images in a grid are enlarged by a whole factor up to TILE, and reduced to LARGE


def key_of(row: dict[str, Any]) -> list[Any]:
    """Returns what a row's figures, except its times, depend on."""
    return [row.get(name) for name in KEY] + [row[name] for name in ("sigmas", "call", "setup") if row.get(name)]


def same_figures(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two rows' figures depend on the same; `setup` is ignored if one row predates the field."""
    known = a.get("setup") and b.get("setup")
    one, other = (dict(row) if known else dict(row) | {"setup": None} for row in (a, b))
    return key_of(one) == key_of(other)


def cell_of(row: Mapping[str, Any]) -> tuple[str, int, int | None]:
    """Returns a row's cell; of several rows of a cell, the last in the file counts."""
    return row["model"], row["steps"], row.get("seed")


def timed(row: Mapping[str, Any], how: Mapping[str, Any] | None) -> bool:
    """Whether a row's times were measured as requested; True if `how` is None, which requests none."""
    timing = row.get("timing") or {}
    return how is None or all(timing.get(name) == value for name, value in how.items())


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a results.jsonl.

    Raises:
        InputError: a line is not a row.
    """
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"model", "steps", "protocol_hash"} <= row.keys():
                raise ValueError
        except ValueError as error:
            raise InputError(
                f"{file} line {number}: got {line[:40]!r}, which is no benchmark row; delete the line"
            ) from error
        rows.append(row)
    return rows


def check_folder(folder: str | Path) -> None:
    """Checks that a folder can hold a benchmark: new, empty, a benchmark's, or of no known kind.

    Raises:
        InputError: it is a training run's, an export, a pipeline, a cache, or not a folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out: got {folder}, which is a file; allowed: a folder; give another")
    if (folder / "results.jsonl").is_file():
        return
    held = [name for name in FOREIGN if (folder / name).exists()] + sorted(f.name for f in folder.glob("*.safetensors"))
    if held:
        raise InputError(
            f"--out: got {folder}, which holds something else ({held[0]}); allowed: a new folder, or a benchmark's; "
            "give another"
        )


def create_folder(folder: str | Path) -> Path:
    """Creates a benchmark's folder if necessary, and returns it.

    Raises:
        InputError: it holds something else, or cannot be written.
    """
    check_folder(folder)
    try:
        (Path(folder) / "grids").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: got {folder}, which cannot be written ({error.strerror}); choose another") from error
    return Path(folder)


class Book:
    """The rows of a folder, or in memory if there is no folder.

    Args:
        facts: the protocol of the rows to be added: its name, hash and settings.

    Raises:
        InputError: the folder holds something else, or rows of another protocol, or cannot be written.
    """

    def __init__(self, folder: str | Path | None, facts: Mapping[str, Any]) -> None:
        self.folder = create_folder(folder) if folder is not None else None
        self.rows: list[dict[str, Any]] = []
        if self.folder is None:
            return
        if self.file.is_file():
            self.rows = read_rows(self.file)
        for row in self.rows:
            check_same_protocol(row, facts, f"--out {self.folder}", "this run", "choose another folder")

    @property
    def file(self) -> Path:
        """Path of results.jsonl."""
        return self.folder / "results.jsonl"

    def find(self, row: dict[str, Any], how: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Returns the newest row with these figures, preferably one timed as `how` requests; None if there is none."""
        same = [old for old in reversed(self.rows) if same_figures(old, row)]
        return next((old for old in same if timed(old, how)), same[0] if same else None)

    def again(self, row: dict[str, Any]) -> dict[str, Any]:
        """Makes an existing row the newest of its cell, as the one requested last."""
        if [old for old in self.rows if cell_of(old) == cell_of(row)][-1] is not row:
            self.rows = [old for old in self.rows if old is not row] + [row]
            self._write()
        return row

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes a row with every field, atomically: neither a reader nor a crash leaves a partial file."""
        if unknown := row.keys() - set(FIELDS):
            raise KeyError(f"row fields {sorted(unknown)} are not in records.FIELDS")
        row = {name: row.get(name) for name in FIELDS}
        self.rows.append(row)
        self._write()
        return row

    def _write(self) -> None:
        if self.folder is not None:
            files.write(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def units(self, row: dict[str, Any], found: Mapping[str, Figure]) -> None:
        """Stores each image's influence on each figure, so that two models can be compared image by image."""
        if self.folder is not None and found:
            moved = {name: figure.influence.float() for name, figure in found.items()}
            arrays.save(units_file(self.folder, row), moved, **{name: figure.unit for name, figure in found.items()})

    def prompts(self, prompts: list[str]) -> None:
        """Stores the prompts of the grids' images."""
        if self.folder is not None:
            files.write(self.folder / "grids" / "prompts.json", json.dumps(prompts, indent=1) + "\n")

    def grid(self, row: dict[str, Any], pictures: Tensor | None) -> None:
        """Stores images (B, 3, H, W) uint8 as a strip; enlarges small ones by nearest neighbour, reduces large ones."""
        if self.folder is None or pictures is None:
            return
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        factor = max(1, TILE // pictures.shape[-2])
        strip = torch.cat(list(pictures), -1).permute(1, 2, 0).numpy()
        picture = Image.fromarray(strip)
        if factor > 1:
            picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        elif pictures.shape[-2] > LARGE:
            scale = LARGE / pictures.shape[-2]
            picture = picture.resize((round(picture.width * scale), LARGE), Image.Resampling.LANCZOS)
        metadata = PngInfo()
        metadata.add_text("pictures", str(len(pictures)))
        picture.save(self.folder / "grids" / grid_name(row), pnginfo=metadata)


def check_same_protocol(
    a: Mapping[str, Any], b: Mapping[str, Any], where_a: str, where_b: str, fix: str = "measure both by one"
) -> None:
    """Checks that two rows are of the same protocol. It is the same if one row lacks metrics for want of the real
    images: the other metrics can be compared.

    Raises:
        InputError: their hashes differ; the message names the differences.
    """
    if a["protocol_hash"] == b["protocol_hash"]:
        return
    complete = bool(a.get("settings") and b.get("settings"))
    settings_a, settings_b = (_protocol_settings(row, complete=complete) for row in (a, b))
    differ = [name for name in settings_a | settings_b if settings_a.get(name) != settings_b.get(name)]
    if differ and set(differ) <= _omission_fields(settings_a) | _omission_fields(settings_b):
        return
    differences = ", ".join(
        f"{name} {_short(settings_a.get(name))} and {_short(settings_b.get(name))}" for name in differ
    )
    raise InputError(
        f"protocol: got {a.get('protocol')} ({a['protocol_hash']}) in {where_a} and {b.get('protocol')} "
        f"({b['protocol_hash']}) in {where_b}; they differ in {differences or 'what these rows do not record'}; "
        f"figures of different protocols cannot be compared; {fix}"
    )


def _protocol_settings(row: Mapping[str, Any], *, complete: bool) -> dict[str, Any]:
    """Returns what a row records of its protocol.

    Args:
        complete: all of `settings`, nested names joined by dots; else only what older rows, without it, record too.
    """
    if complete:
        settings = flat(row["settings"])
        return {"protocol": settings.pop("name", None)} | settings
    names = ("protocol", "n", "fd_extractor", "clip_model")
    return {name: row[name] for name in names if row.get(name) is not None}


def _omission_fields(settings: Mapping[str, Any]) -> set[str]:
    """Returns the fields that differ only because a row lacks metrics for want of the real images."""
    names = str(settings.get(f"content.{OMITTED}", "")).split()
    return {f"content.{OMITTED}", *(f"content.{name} revision" for name in names)} if names else set()


def _short(value: Any) -> str:
    text = "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else text[:16] + "…"


def grid_name(row: dict[str, Any]) -> str:
    """Returns the name of a row's strip inside grids/."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", str(row["model"])).strip("-.")[:100] or "model"
    key = hashlib.sha256(json.dumps(key_of(row)).encode()).hexdigest()[:6]
    return f"{safe}_{row['steps']}_{key}.png"


def units_file(folder: Path, row: dict[str, Any]) -> Path:
    """Returns the file with each unit's influence on a row's figures."""
    return folder / "units" / grid_name(row).replace(".png", ".safetensors")


def read_units(folder: Path, row: dict[str, Any]) -> dict[str, tuple[Tensor, str]]:
    """Reads each unit's influence on a row's figures: (N,) and the kind of unit, by figure; empty if not stored.

    Raises:
        InputError: the file is damaged.
    """
    file = units_file(folder, row)
    if not file.is_file():
        return {}
    moved, units = arrays.load(file)
    return {name: (influence.double(), units[name]) for name, influence in moved.items()}


def write_record(file: Path, record: Mapping[str, Any], device: str = "cpu") -> None:
    """Writes what a script measured, with its provenance."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, json.dumps({**record, **provenance(device)}, indent=2) + "\n")
