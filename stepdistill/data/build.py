"""Builds caches, keyed by teacher and data, shard by shard: processes share them, an interrupted build resumes."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stepdistill.conditioning.base import expand
from stepdistill.data.ahead import ahead
from stepdistill.data.broken import BrokenList
from stepdistill.data.sources import PictureError, Source, key_of, to_tensor
from stepdistill.denoiser.load import Teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.files import disk_full, sync, write
from stepdistill.processes import Processes

FORMAT = 4
SHARD = 512  # samples, or distinct captions, per file: the most that an interrupted build loses
BATCH = 64  # images or captions per forward, fewer if they are large
PIXELS = BATCH * 256 * 256  # per forward of the autoencoder
GUIDANCE = 2.0  # default for the images that the teacher generates
HALVED = ("text", "pooled")


def teacher_key(teacher: Teacher, *, painting: bool = False) -> str:
    """Returns a key that changes with the teacher's encoding of images and captions.

    A hash of the weights and settings of autoencoder, text encoders and tokenizers; with `painting`, also of denoiser
    and scheduler, the denoiser's weights rounded to bfloat16, as runs in bfloat16 load them. Adapters are excluded.
    """
    digest = hashlib.sha256(teacher.family.encode())
    for name, part in sorted(teacher.source.components.items()):
        if not painting and name in (teacher.part, "scheduler"):
            continue
        config = {k: v for k, v in dict(getattr(part, "config", None) or {}).items() if not k.startswith("_")} if (
            name in ("vae", "scheduler")) else {}  # fmt: skip
        vocabulary = part.get_vocab() if hasattr(part, "get_vocab") else {}
        digest.update(json.dumps([name, config, vocabulary], sort_keys=True, default=str).encode())
        for key, weight in sorted(part.state_dict().items()) if isinstance(part, torch.nn.Module) else ():
            if ".lora_" not in key:
                if name == teacher.part and weight.is_floating_point():
                    weight = weight.to(torch.bfloat16)
                digest.update(f"{name}.{key.replace('.base_layer', '')} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def picture_size(teacher: Teacher, resolution: int | None) -> tuple[int, int]:
    """Returns (height, width) in pixels for a resolution with this teacher.

    Raises:
        InputError: it is no multiple of the autoencoder's factor times the patch size, or not a pixel model's own.
    """
    height, width = teacher.image_size
    if resolution is None or resolution == height == width:
        return height, width
    if teacher.vae is None:
        raise InputError(f"resolution: got {resolution}; allowed: {height}, this pixel model's own; leave it out")
    step = teacher.factor * teacher.denoiser.patch
    if resolution < step or resolution % step:
        near = max(1, round(resolution / step)) * step
        raise InputError(
            f"resolution: got {resolution}; allowed: multiples of {step} with this teacher, whose own is "
            f"{height}; try {near}"
        )
    return resolution, resolution


def without_silence(text: Tensor) -> Tensor:
    """Drops trailing tokens of (B, S, D) that are zero in the whole batch, such as those that stand for an absent T5;
    keeps at least one."""
    nonzero_tokens = text.any(2).any(0).nonzero()
    return text[:, : int(nonzero_tokens.max()) + 1 if len(nonzero_tokens) else 1]


class Plan:
    """The intended content of a cache.

    Args:
        size: (height, width) in pixels.
        seed, steps, guidance, precision: how the teacher generates, if the source has no images; see `open_data`.
        limit: use only the first `limit` samples. half: store latents and text in float16.

    Attributes:
        key: changes if anything in the cache would.
    """

    def __init__(
        self, source: Source, teacher: Teacher, size: tuple[int, int], *, seed: int = 0, steps: int = 50,
        guidance: float = GUIDANCE, limit: int | None = None, half: bool = False,
        precision: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if limit is not None and limit < 1:
            raise InputError(f"limit: got {limit}; allowed: 1 or more; leave it out for all")
        if source.picture is None and (steps < 1 or not guidance >= 1):
            raise InputError(
                f"painting: got {steps} steps, guidance {guidance:g}; allowed: 1 or more each; try 50 and 2"
            )
        self.source, self.teacher, self.size = source, teacher, size
        self.seed, self.steps, self.guidance, self.half = seed, steps, guidance, half
        self.precision = precision
        self.captions = source.captions[:limit]
        self.distinct = {caption: row for row, caption in enumerate(dict.fromkeys(self.captions))}
        self.painted = source.picture is None
        self.teacher_key = teacher_key(teacher, painting=self.painted)
        how = (seed, steps, guidance, *([precision] if precision else [])) if self.painted else ()
        self.key = key_of(FORMAT, self.teacher_key, source.key, size, limit, half, *how)

    def build(self, folder: Path, team: Processes) -> Path:
        """Writes the cache to a temporary folder, then renames it to `folder`; does nothing if `folder` is a cache.

        All processes of the team must call it: they share the shards. Other runs wait until the cache is built.

        Raises:
            InputError: the disk is full or not writable, or too many images are broken. Finished shards are kept,
                except in the last case.
        """
        from filelock import FileLock

        beside = folder.with_name(f".{folder.name}.{self.key}.building")
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            with team.alike():
                folder.parent.mkdir(parents=True, exist_ok=True)
                if team.main:
                    lock.acquire()
            if not team.broadcast((folder / "manifest.json").is_file()):
                self._build(beside, team)
                with team.alike():
                    if team.main:
                        if folder.exists():
                            folder.rmdir()  # it is empty
                        beside.rename(folder)
        except (OSError, SafetensorError) as error:
            if disk_full(error):
                raise InputError(
                    f"disk: got no space left while writing {beside}; what is done is kept; free some and run the same "
                    "command again"
                ) from error
            if isinstance(error, PermissionError):
                raise InputError(
                    f"cache: got {folder.parent}, which cannot be written; allowed: a folder of yours; set "
                    "STEPDISTILL_CACHE"
                ) from error
            raise
        finally:
            lock.release()
        return folder

    def _build(self, folder: Path, team: Processes) -> None:
        with team.alike():
            folder.mkdir(exist_ok=True)
            self.broken = BrokenList(folder, len(self.captions), team.rank)
        try:
            with team.alike():
                self._make(folder, team)
            with team.alike():
                if team.main:
                    self._finish(folder)
        except InputError:
            if team.main and self.broken.too_many():
                shutil.rmtree(folder)  # with mended images the source, and so the cache, is another
            raise

    def _make(self, folder: Path, team: Processes) -> None:
        """Makes this process's share of the shards, except for those that exist."""
        verb = "generating" if self.painted else "encoding"
        jobs = (("conditions", "encoding captions", len(self.distinct), self._conditions),
                ("shards", f"{verb} {self.source.name}", len(self.captions), self._latents))  # fmt: skip
        for kind, title, count, make in jobs:
            own = team.share(_shards(kind, count))
            total = sum(len(indices) for _, indices in own)
            title += f", one of {team.count} shares" * (team.count > 1)
            with tqdm(total=total, desc=title, unit="", dynamic_ncols=True, disable=not team.main) as bar:
                for name, indices in own:
                    if (folder / name).exists():
                        bar.update(len(indices))
                    else:
                        _save(make(indices, bar), folder / name)

    def _finish(self, folder: Path) -> None:
        """Writes what there is one of, the manifest last."""
        captions = list(self.distinct)
        counts = {"conditions": len(captions), "shards": len(self.captions)}
        names = {kind: [name for name, _ in _shards(kind, count)] for kind, count in counts.items()}
        if missing := [name for kind in names for name in names[kind] if not (folder / name).exists()]:
            raise InputError(
                f"processes: got no {missing[0]} from another one in {folder}; allowed: a cache on a disk that all "
                "share; set $STEPDISTILL_CACHE, or --out of `stepdistill cache`, to one"
            )
        self.broken.merge()
        try:
            nothing = self.teacher.conditioner.unconditional(1, size=self.size)
        except InputError:  # classes without a null label: no guidance
            nothing = {}
        _save({k: v.cpu().contiguous() for k, v in nothing.items()}, folder / "unconditional.safetensors")
        write(folder / "captions.json", json.dumps(captions))
        manifest = {
            "format": FORMAT, "key": self.key, "teacher": self.teacher_key, "teacher_path": self.teacher.path,
            "source": self.source.name, "painted": self.painted, "size": list(self.size), "half": self.half,
            "count": len(self.captions) - len(self.broken), "broken": len(self.broken),
            "distinct_captions": len(captions), **names,
        }  # fmt: skip
        if self.painted:
            manifest |= {"seed": self.seed, "steps": self.steps, "guidance": self.guidance}
            manifest["precision"] = str(self.precision or torch.float32).removeprefix("torch.")
        write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        if len(self.broken):
            tqdm.write(f"{self.source.name}: {self.broken.summary()}", file=sys.stderr)

    def _conditions(self, indices: range, bar: tqdm) -> dict[str, Tensor]:
        captions = list(self.distinct)[indices.start : indices.stop]
        parts = []
        for start in range(0, len(captions), BATCH):
            batch = captions[start : start + BATCH]
            parts.append(self.teacher.conditioner.encode(batch, size=self.size))
            bar.update(len(batch))
        joined = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
        if "text" in joined:
            joined["text"] = without_silence(joined["text"])
        return {key: self._kept(value) if key in HALVED else value.contiguous() for key, value in joined.items()}

    def _latents(self, indices: range, bar: tqdm) -> dict[str, Tensor]:
        parts, rows = [], []
        step = max(1, min(BATCH, PIXELS // (self.size[0] * self.size[1])))
        batches = [indices[start : start + step] for start in range(0, len(indices), step)]
        if self.painted:
            made = ((batch, self._paint(batch)) for batch in batches)
        else:
            made = map(self._encode, batches, ahead(self._decoded, batches))
        for batch, (whole, x0) in zip(batches, made, strict=True):
            parts.append(self._kept(x0))
            rows += [self.distinct[self.captions[i]] for i in whole]
            bar.update(len(batch))
        return {"x0": torch.cat(parts), "caption": torch.tensor(rows, dtype=torch.long)}

    def _kept(self, value: Tensor) -> Tensor:
        return value.to("cpu", torch.float16 if self.half else torch.float32).contiguous()

    @property
    def _device(self) -> torch.device:
        """The device of the part that makes the latents; a network that generates nothing may be elsewhere."""
        maker = self.teacher.denoiser if self.painted or self.teacher.vae is None else self.teacher.vae
        return next(maker.parameters()).device

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.teacher.sample_shape[0], *(side // self.teacher.factor for side in self.size)

    def _decoded(self, i: int) -> Tensor | PictureError:
        """Returns the image of a sample, (C, height, width); if it is broken, why."""
        channels = 3 if self.teacher.vae is not None else self.teacher.sample_shape[0]
        try:
            return to_tensor(self.source.picture(i), self.size, channels)
        except PictureError as error:
            return error

    def _encode(self, indices: range, decoded: Iterable[Tensor | PictureError]) -> tuple[list[int], Tensor]:
        """Returns those of the samples whose images could be decoded, and their latents."""
        whole = {}
        for i, picture in zip(indices, decoded, strict=True):
            if isinstance(picture, PictureError):
                self.broken.add(i, picture)
            else:
                whole[i] = picture
        if not whole:
            return [], torch.empty(0, *self._shape)
        return list(whole), self.teacher.encode(torch.stack(list(whole.values())).to(self._device))

    def _paint(self, indices: range) -> Tensor:
        """Generates the teacher's guided samples for some captions, each from its own noise."""
        from stepdistill.sampling import sample

        captions = [self.captions[i] for i in indices]
        draws = Draws.at(self.seed, indices[0], len(captions), self._device)
        x_T = draws.normal(*self._shape)
        cond = self.teacher.conditioner.encode(captions, size=self.size)
        uncond = None
        if self.guidance != 1:
            uncond = expand(self.teacher.conditioner.unconditional(1, size=self.size), len(captions))
        with torch.autocast(self._device.type, self.precision, enabled=self.precision is not None):
            return sample(self.teacher.denoiser, x_T, cond, uncond, steps=self.steps, guidance=self.guidance)


def _shards(kind: str, count: int) -> list[tuple[str, range]]:
    """Returns each shard's file name and the indices of the samples, or captions, in it."""
    ranges = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
    return [(f"{kind}-{number:05d}.safetensors", indices) for number, indices in enumerate(ranges)]


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes to a temporary file and renames it: a file of this name is complete."""
    beside = file.with_name(f"{file.name}.new")
    try:
        save_file(tensors, beside)
        sync(beside)
        beside.rename(file)
    finally:
        beside.unlink(missing_ok=True)
