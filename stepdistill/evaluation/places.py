"""What a SPEC names, on the disk or the hub, looked at without loading any weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from stepdistill.errors import InputError


def export_in(folder: str) -> str:
    """A training run's folder, which has no weights of its own, to the export in it; anything else as it is."""
    place = Path(folder).expanduser()

    def weights(where: Path) -> bool:
        return (where / "model_index.json").is_file() or any(where.glob("*.safetensors"))

    with contextlib.suppress(OSError):  # it cannot be looked into, which is told where it is loaded
        if place.is_dir() and not weights(place) and weights(place / "export"):
            return str(place / "export")
    return str(place) if folder.startswith("~") else folder


def hub_file(text: str) -> tuple[str, str] | None:
    """owner/name/path.safetensors as (hub id, path); None for anything else, and for what is on the disk."""
    parts = text.split("/")
    named = len(parts) > 2 and text.endswith(".safetensors") and parts[0] not in ("", ".", "..", "~")
    return ("/".join(parts[:2]), "/".join(parts[2:])) if named and not Path(text).exists() else None


def fetched(text: str) -> str:
    """A file on the hub, brought here; anything else as it is.

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
            f"{text}: got {found[1]} of {found[0]}, which could not be had ({reason[:160]}); check the names, the "
            "network and `hf auth login`"
        ) from error


def beside(lora: str, name: str) -> Path | None:
    """A file of a LoRA's export, on the disk or on the hub; None where there is none."""
    folder = Path(lora)
    if (folder / name).is_file():
        return folder / name
    if folder.exists() or hub_file(lora) or lora.startswith((".", "/", "~")) or lora.count("/") != 1:
        return None
    return _on_hub(lora, name)


@lru_cache
def _on_hub(hub_id: str, name: str) -> Path | None:
    """A file of a repository; asked for once, since without a network that takes half a minute."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, name))
    except EntryNotFoundError:  # or, without a network, none in the cache
        return None


def check(path: str, lora: str | None = None, *, remote: bool = True) -> None:
    """Looks whether a pipeline and a LoRA are there.

    Args:
        remote: ask the hub too, for a pipeline that is not here.

    Raises:
        InputError: one of them is not, or is something else.
    """
    from stepdistill.denoiser.load import class_of, find

    if remote or Path(find(path)).exists():
        class_of(path)
    if lora:
        check_lora(lora)


def absent(models: Iterable[tuple[str, str, str | None]], *, remote: bool = True) -> dict[str, str]:
    """name -> why, of those of (name, path, LoRA) that are not there or cannot be read.

    Args:
        remote: see `check`.
    """
    found: dict[str, str] = {}
    for name, path, lora in models:
        try:
            check(path, lora, remote=remote)
        except (InputError, OSError) as error:
            found.setdefault(name, " ".join(str(error).split()))
    return found


def check_lora(lora: str) -> None:
    """Looks whether a LoRA's folder or file is there; a hub id is taken as it is.

    Raises:
        InputError: it is not, or holds no weights.
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
        if chain := sorted(int(n) for export in folder.glob("steps-*") if (n := export.name[6:]).isdigit()):
            names = ", ".join(f"steps-{steps}" for steps in chain)
            fix = f"give {folder / f'steps-{chain[0]}'}"
            raise InputError(f"lora: got {lora}, a chain of students; allowed: one of {names}; {fix}")
        cut = (folder / "checkpoints").is_dir()
        hint = "a run that has ended; run its command again" if cut else "the folder of a run, or the export in it"
        raise InputError(f"lora: got {lora}, which holds no .safetensors file; allowed: {hint}")


def picture_size(path: str, *, remote: bool = True) -> int | None:
    """Side in pixels of the pictures a pipeline draws when it is not told; None where its configuration does not say.

    Args:
        remote: ask the hub too, for a pipeline that is not here.

    Raises:
        InputError: the path is no pipeline.
    """
    from stepdistill.denoiser.load import find

    path = find(path)
    return side_of(*(_config(path, part, remote) for part in ("unet", "transformer", "vae")))


def drawn_size(pipeline) -> int | None:
    """The same of a pipeline that is loaded."""
    return side_of(*(getattr(getattr(pipeline, part, None), "config", {}) for part in ("unet", "transformer", "vae")))


def side_of(unet: Mapping, transformer: Mapping, vae: Mapping) -> int | None:
    """Side in pixels of what networks of these configurations draw; None where they do not say."""
    sides = [network.get("sample_size") for network in (unet, transformer)]
    side = next((side for side in sides if isinstance(side, int)), None)
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")  # the latter Sana's
    return side and side * 2 ** (len(blocks) - 1 if blocks else 0)


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
