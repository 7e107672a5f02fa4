"""Checks what a SPEC names, on disk or on the hub, without loading any weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.errors import InputError
from stepdistill.export.folder import missing

if TYPE_CHECKING:
    from stepdistill.evaluation.spec import ModelSpec


def hub_file(text: str) -> tuple[str, str] | None:
    """Splits owner/name/path.safetensors into (hub id, path); None for anything else, and for a file on disk."""
    parts = text.split("/")
    named = len(parts) > 2 and text.endswith(".safetensors") and parts[0] not in ("", ".", "..", "~")
    return ("/".join(parts[:2]), "/".join(parts[2:])) if named and not Path(text).exists() else None


def fetched(text: str) -> str:
    """Downloads a file named on the hub and returns its path; returns anything else unchanged.

    Raises:
        InputError: there is no such file, or the hub cannot be reached.
    """
    if (found := hub_file(text)) is None:
        return text
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(*found)
    except Exception as error:  # offline, gated, no such repository, no such file
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{text}: got {found[1]} of {found[0]}, which could not be downloaded ({reason[:160]}); check the names, "
            "the network and `hf auth login`"
        ) from error


def beside(lora: str, name: str) -> Path | None:
    """Returns a file of a LoRA's export, on disk or on the hub; None if there is none."""
    folder = Path(lora)
    if (folder / name).is_file():
        return folder / name
    if folder.exists() or hub_file(lora) or lora.startswith((".", "/", "~")) or lora.count("/") != 1:
        return None
    return _on_hub(lora, name)


@lru_cache
def _on_hub(hub_id: str, name: str) -> Path | None:
    """Returns a file of a repository, cached: without a network a request takes half a minute."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, name))
    except EntryNotFoundError:  # or, without a network, none in the cache
        return None


def check(spec: ModelSpec, *, remote: bool = True) -> None:
    """Checks that a SPEC's pipeline and LoRA exist, and that its scheduler fits a pipeline on disk.

    Args:
        remote: also ask the hub for a pipeline that is not on disk.

    Raises:
        InputError: one of them does not exist, or is something else; or the scheduler is for another process.
    """
    from stepdistill.denoiser.load import class_of, find
    from stepdistill.evaluation.schedulers import check_process

    local = Path(find(spec.path))
    if remote or local.exists():
        class_of(spec.path)
    if spec.lora:
        check_lora(spec.lora)
    try:
        own = json.loads((local / "scheduler" / "scheduler_config.json").read_text())
        kind = own["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):  # loading the pipeline reports it
        return
    check_process(spec, kind, own)


def absent(models: Iterable[tuple[str, ModelSpec]], *, remote: bool = True) -> dict[str, str]:
    """Returns name -> reason for each (name, SPEC) of which something does not exist, cannot be read or does not fit.

    Args:
        remote: see `check`.
    """
    found: dict[str, str] = {}
    for name, spec in models:
        try:
            check(spec, remote=remote)
        except (InputError, OSError) as error:
            found.setdefault(name, " ".join(str(error).split()))
    return found


def check_lora(lora: str) -> None:
    """Checks that a LoRA's folder or file exists; a hub id is not checked.

    Raises:
        InputError: it does not exist, or holds no weights.
    """
    folder = Path(lora)
    if hub_file(lora):
        return
    try:
        there = folder.exists()
    except OSError as error:
        raise InputError(f"lora: got {lora} ({error.strerror}); allowed: a folder that can be read") from error
    if not there and (lora.startswith((".", "/")) or lora.count("/") != 1):
        raise InputError(
            f"lora: got {lora}, which does not exist; allowed: an export folder, a .safetensors file, or a hub id"
        )
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise InputError(f"lora: got {lora}, {missing(folder)}")


def picture_size(path: str, *, remote: bool = True) -> int | None:
    """Returns a pipeline's default image size, a side in pixels; None if its configuration does not state one.

    Args:
        remote: also ask the hub for a pipeline that is not on disk.

    Raises:
        InputError: the path is not a pipeline.
    """
    from stepdistill.denoiser.families import side_of
    from stepdistill.denoiser.load import find

    path = find(path)
    return side_of(*(_config(path, part, remote) for part in ("unet", "transformer", "vae")))


def _config(path: str, part: str, remote: bool) -> dict:
    from diffusers import UNet2DConditionModel

    for cached in (True, False) if remote else (True,):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return UNet2DConditionModel.load_config(path, subfolder=part, local_files_only=cached)
        except (OSError, ValueError):
            continue
    return {}
