"""A frozen teacher's encoding of the data, computed once: latents, and the conditions of each distinct caption.

    stepdistill cache --teacher T --data D --out DIR

A cache is a folder of safetensors shards with a manifest. It is built shard by shard in a temporary folder and
renamed when complete, so an interrupted build resumes where it stopped, and an existing cache is complete.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.conditioning.base import Cond
from stepdistill.data.build import FORMAT, GUIDANCE, SHARD, Plan, picture_size, teacher_key
from stepdistill.data.sources import open_source
from stepdistill.denoiser.load import Teacher
from stepdistill.errors import InputError
from stepdistill.files import cache_folder
from stepdistill.processes import Processes

ALONE = Processes()


class LatentCache:
    """Latents and conditions, memory-mapped from a cache folder.

    Attributes:
        captions: one per sample.
        uncond: the condition that guidance moves away from, batch size 1; empty if the teacher has none.
        key: changes if anything in the cache does. manifest: how it was built.

    Raises:
        InputError: the folder holds no cache, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            if self.manifest.get("format") != FORMAT:
                raise ValueError("another version wrote it")
            shards = [load_file(folder / name) for name in self.manifest["shards"]]
            tables = [load_file(folder / name) for name in self.manifest["conditions"]]
            self.uncond: Cond = _floats(load_file(folder / "unconditional.safetensors"))
            distinct = json.loads((folder / "captions.json").read_text())
            self._latents = [shard["x0"] for shard in shards]
            self._row = torch.cat([shard["caption"] for shard in shards]).tolist()
            if len(self._row) != self.manifest["count"]:
                raise ValueError("samples are missing")
            self.captions = [distinct[row] for row in self._row]
        except (OSError, ValueError, KeyError, IndexError, AttributeError, SafetensorError) as error:
            raise InputError(
                f"cache: got {folder}, which is damaged or no cache ({str(error)[:80]}); allowed: a folder made by "
                "`stepdistill cache`; remove it and make it again"
            ) from error
        self._starts = list(itertools.accumulate((len(x0) for x0 in self._latents), initial=0))
        self._conditions = {key: [table[key] for table in tables] for key in tables[0]}
        self._tokens = self.uncond["text"].shape[1] if "text" in self.uncond else 0
        self.key: str = self.manifest["key"]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"x0": (C, h, w), "cond": {name: (...)}} of one sample."""
        x0, cond = self.batch([range(len(self))[index]])
        return {"x0": x0[0], "cond": {key: value[0] for key, value in cond.items()}}

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Cond]:
        """Returns x0 (B, C, h, w) float32 and conditions of batch size B."""
        places = [(bisect.bisect_right(self._starts, i) - 1, i) for i in indices]
        x0 = torch.stack([self._latents[shard][i - self._starts[shard]] for shard, i in places])
        rows = [self._row[i] for i in indices]
        cond = {k: torch.stack([self._kept(k, r) for r in rows]) for k in self._conditions}
        return x0.float(), _floats(cond)

    def _kept(self, name: str, row: int) -> Tensor:
        """Returns a condition of one caption; text is padded with the zero tokens that were dropped."""
        value = self._conditions[name][row // SHARD][row % SHARD]
        missing = self._tokens - len(value) if name == "text" else 0
        return F.pad(value, (0, 0, 0, missing)) if missing else value


def _floats(cond: Cond) -> Cond:
    return {key: value.float() if value.is_floating_point() else value for key, value in cond.items()}


def open_data(
    spec: str,
    teacher: Teacher,
    *,
    resolution: int | None = None,
    cache_dir: Path | str | None = None,
    seed: int = 0,
    synthetic_steps: int = 50,
    synthetic_guidance: float | None = None,
    limit: int | None = None,
    half: bool = False,
    precision: torch.dtype | None = None,
    team: Processes = ALONE,
) -> LatentCache:
    """Opens the cache of a `--data` value, or builds it if there is none.

    Args:
        spec: see `sources`; or a cache folder, which is opened unchanged.
        resolution: side of the images in pixels; default: the teacher's own.
        cache_dir: where caches are stored; default: $STEPDISTILL_CACHE or ~/.cache/stepdistill.
        seed, synthetic_steps, synthetic_guidance: how the teacher generates images for a source of prompts; default
            guidance 2. If given, guidance must equal that of a cache of generated images.
        limit: use only the first `limit` samples.
        half: store latents and text in float16, in half the disk space; ignored for an existing cache.
        precision: autocast dtype in which the teacher generates; None means float32.
        team: processes that share the building; all must call this.

    Raises:
        InputError: invalid data (see `sources`), a resolution the autoencoder does not support, or a cache of another
            teacher, size or guidance.
    """
    size = picture_size(teacher, resolution)
    if is_cache(spec):
        return _made_for(teacher, LatentCache(Path(spec)), spec, resolution, synthetic_guidance)
    plan = Plan(
        open_source(spec), teacher, size, seed=seed, steps=synthetic_steps,
        guidance=GUIDANCE if synthetic_guidance is None else synthetic_guidance, limit=limit, half=half,
        precision=precision,
    )  # fmt: skip
    return LatentCache(plan.build(Path(cache_dir or cache_folder()) / f"data-{plan.key}", team))


def is_cache(spec: str | None) -> bool:
    """Whether data are a cache folder."""
    return spec is not None and (Path(spec) / "manifest.json").is_file()


def size_of(spec: str | None, teacher: Teacher, resolution: int | None) -> tuple[int, int]:
    """Returns (height, width) in pixels of a run's images: that of `resolution`, else the cache's if the data are one,
    else the teacher's own.

    Raises:
        InputError: see `picture_size`, or the cache is broken.
    """
    if resolution is None and is_cache(spec):
        return tuple(LatentCache(Path(spec)).manifest["size"])
    return picture_size(teacher, resolution)


def make_cache(
    spec: str,
    teacher: Teacher,
    out: Path,
    *,
    resolution: int | None = None,
    seed: int = 0,
    synthetic_steps: int = 50,
    synthetic_guidance: float = GUIDANCE,
    limit: int | None = None,
    half: bool = False,
    precision: torch.dtype | None = None,
    team: Processes = ALONE,
) -> LatentCache:
    """Builds a cache at `out`, or opens the existing one. Arguments as in `open_data`.

    Raises:
        InputError: as `open_data`; or `out` holds something else.
    """
    size = picture_size(teacher, resolution)
    plan = Plan(
        open_source(spec), teacher, size, seed=seed, steps=synthetic_steps, guidance=synthetic_guidance, limit=limit,
        half=half, precision=precision,
    )  # fmt: skip
    out = Path(out)
    there = out / "manifest.json"
    if out.exists() and any(out.iterdir()) and not (there.is_file() and LatentCache(out).key == plan.key):
        raise InputError(
            f"--out: got {out}, which holds something else; allowed: a new folder, or this very cache; give another"
        )
    return LatentCache(plan.build(out, team))


def _made_for(
    teacher: Teacher, cache: LatentCache, spec: str, resolution: int | None, guidance: float | None
) -> LatentCache:
    made = cache.manifest
    if made["teacher"] != teacher_key(teacher, painting=made["painted"]):
        raise InputError(
            f"--data: got the cache {spec}, made with another teacher ({made['teacher_path']}); allowed: one made with "
            "this one; run `stepdistill cache` again"
        )
    if resolution is not None and made["size"] != [resolution, resolution]:
        raise InputError(
            f"resolution: got {resolution} with the cache {spec} of {made['size'][0]}; allowed: the cache's own; leave "
            "it out"
        )
    if made["painted"] and guidance not in (None, made["guidance"]):
        raise InputError(
            f"guidance: got {guidance:g} with the cache {spec}, painted at {made['guidance']:g}; allowed: the same; "
            f"run `stepdistill cache --guidance {guidance:g}`, or train with the cache's"
        )
    return cache
