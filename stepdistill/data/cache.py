"""Everything a frozen teacher says of the data, computed once: latents, and the conditions of each distinct caption.

    stepdistill cache --teacher T --data D --out DIR

A cache is a folder of safetensors shards with a manifest. It is built shard by shard in a folder beside and renamed when
whole, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from stepdistill.conditioning.base import Cond
from stepdistill.data.sources import Source, key_of, open_source, to_tensor
from stepdistill.denoiser.load import Teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError

SHARD = 2048
ENCODE_BATCH = 64


class LatentCache:
    """Latents and conditions, memory-mapped from a cache folder.

    Attributes:
        captions: one for each sample.
        uncond: the condition guidance moves away from, batch 1.
    """

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        self.shards = [load_file(folder / name)["x0"] for name in manifest["shards"]]
        self.starts = list(itertools.accumulate((len(s) for s in self.shards), initial=0))
        tensors = load_file(folder / "conditions.safetensors")
        self.text_of = tensors.pop("caption")
        self.uncond = {k.removeprefix("uncond."): v for k, v in tensors.items() if k.startswith("uncond.")}
        self.cond = {k.removeprefix("cond."): v for k, v in tensors.items() if k.startswith("cond.")}
        distinct = json.loads((folder / "captions.json").read_text())
        self.captions = [distinct[i] for i in self.text_of.tolist()]
        self.key = manifest["key"]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict:
        """{"x0": (C, h, w), "cond": {name: (...)}} of one sample."""
        x0, cond = self.batch([index])
        return {"x0": x0[0], "cond": {k: v[0] for k, v in cond.items()}}

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Cond]:
        """x0 (B, C, h, w) float32 and conditions of batch B."""
        places = [(bisect.bisect_right(self.starts, i) - 1, i) for i in indices]
        x0 = torch.stack([self.shards[shard][i - self.starts[shard]] for shard, i in places]).float()
        rows = self.text_of[torch.as_tensor(list(indices))]
        return x0, {k: v[rows] for k, v in self.cond.items()}


def teacher_key(teacher: Teacher) -> str:
    """Changes with what the teacher makes of pictures and captions: its path and a fingerprint of its weights."""
    prints = []
    for name, module in sorted(teacher.source.components.items()):
        if isinstance(module, torch.nn.Module):
            weights = [p.detach().double().sum() for k, p in module.state_dict().items() if "lora" not in k and p.is_floating_point()]
            prints.append(f"{name}:{torch.stack(weights).sum().item():.10e}" if weights else name)
    return key_of(teacher.family, *prints)


def picture_size(teacher: Teacher, resolution: int | None) -> tuple[int, int]:
    """(height, width) in pixels that a resolution means for this teacher."""
    height, width = teacher.image_size
    if resolution is None or resolution == height == width:
        return height, width
    factor = teacher.source.vae_scale_factor if teacher.vae is not None else 1
    if resolution < factor or resolution % factor:
        raise InputError(f"resolution: got {resolution}; allowed: multiples of {factor} for this teacher; its own is {height}")
    return resolution, resolution


def open_data(
    spec: str,
    teacher: Teacher,
    *,
    resolution: int | None = None,
    cache_dir: Path | None = None,
    seed: int = 0,
    synthetic_steps: int = 50,
    synthetic_guidance: float = 2.0,
    limit: int | None = None,
) -> LatentCache:
    """The cache of a `--data` value, built if it is not there yet.

    Args:
        spec: see `sources`; or a cache folder, which is opened as it is.
        resolution: side of the pictures; the teacher's own where not given.
        cache_dir: where caches are kept; $STEPDISTILL_CACHE or ~/.cache/stepdistill where not given.
        synthetic_steps, synthetic_guidance: how the teacher paints for a source of prompts.
        limit: the first so many samples only.

    Raises:
        InputError: bad data (see `sources`), or a resolution the autoencoder cannot take.
    """
    if (Path(spec) / "manifest.json").is_file():
        return LatentCache(Path(spec))
    size = picture_size(teacher, resolution)
    source = open_source(spec)
    root = cache_dir or Path(os.environ.get("STEPDISTILL_CACHE", Path.home() / ".cache" / "stepdistill"))
    painted = (seed, synthetic_steps, synthetic_guidance)
    key = key_of(teacher_key(teacher), source.key, size, limit, painted if source.name.endswith(".txt") else "")
    folder = Path(root) / f"data-{key}"
    if not (folder / "manifest.json").is_file():
        build(source, teacher, folder, size=size, key=key, seed=seed, steps=synthetic_steps, guidance=synthetic_guidance, limit=limit)
    return LatentCache(folder)


def build(
    source: Source, teacher: Teacher, folder: Path, *, size: tuple[int, int], key: str, seed: int, steps: int,
    guidance: float, limit: int | None,
) -> None:  # fmt: skip
    """Writes a cache folder, going on with the shards of a build that was cut off."""
    beside = folder.with_name(f".{folder.name}.building")
    beside.mkdir(parents=True, exist_ok=True)
    device = next(teacher.denoiser.parameters()).device
    distinct: dict[str, int] = {}
    caption_of: list[int] = []
    names: list[str] = []
    samples = itertools.islice(source.samples(), limit)
    total = source.count if limit is None or source.count is None else min(limit, source.count)
    try:
        with tqdm(total=total, desc=f"encoding {source.name}", unit="img", dynamic_ncols=True) as bar:
            while chunk := list(itertools.islice(samples, SHARD)):
                captions = [caption for _, caption in chunk]
                caption_of += [distinct.setdefault(c, len(distinct)) for c in captions]
                name = f"latents-{len(names):05d}.safetensors"
                if not (beside / name).exists():
                    first = len(names) * SHARD
                    parts = []
                    for start in range(0, len(chunk), ENCODE_BATCH):
                        part = chunk[start : start + ENCODE_BATCH]
                        if part[0][0] is None:
                            draws = Draws.at(seed, first + start, len(part), device)
                            parts.append(_paint(teacher, [c for _, c in part], draws, steps, guidance, size))
                        else:
                            parts.append(teacher.encode(torch.stack([to_tensor(p, size) for p, _ in part]).to(device)))
                        bar.update(len(part))
                    save_file({"x0": torch.cat(parts).float().cpu().contiguous()}, beside / f"{name}.new")
                    (beside / f"{name}.new").rename(beside / name)
                else:
                    bar.update(len(chunk))
                names.append(name)
        if not names:
            raise InputError(f"--data: got {source.name}, which is empty; allowed: one sample or more")
        tensors = {f"uncond.{k}": v.cpu().contiguous() for k, v in teacher.conditioner.unconditional(1, size=size).items()}
        texts = list(distinct)
        parts = [teacher.conditioner.encode(texts[i : i + ENCODE_BATCH], size=size) for i in
                 tqdm(range(0, len(texts), ENCODE_BATCH), desc="encoding captions", dynamic_ncols=True)]  # fmt: skip
        tensors |= {f"cond.{k}": torch.cat([p[k] for p in parts]).cpu().contiguous() for k in parts[0]}
        save_file(tensors | {"caption": torch.tensor(caption_of)}, beside / "conditions.safetensors")
        (beside / "captions.json").write_text(json.dumps(texts))
        (beside / "manifest.json").write_text(json.dumps({"key": key, "source": source.name, "size": size, "shards": names}))
    except OSError as error:
        if error.errno == 28:
            raise InputError(f"disk: got no space left while writing {beside}; free some and run the same command again") from error
        raise
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _paint(teacher: Teacher, captions: list[str], draws: Draws, steps: int, guidance: float, size: tuple[int, int]) -> Tensor:
    """The teacher's own guided samples for some captions, (B, C, h, w)."""
    from stepdistill.conditioning.base import expand
    from stepdistill.sampling import sample

    factor = teacher.source.vae_scale_factor if teacher.vae is not None else 1
    x_T = draws.normal(teacher.sample_shape[0], size[0] // factor, size[1] // factor)
    cond = teacher.conditioner.encode(captions, size=size)
    uncond = expand(teacher.conditioner.unconditional(1, size=size), len(captions))
    return sample(teacher.denoiser, x_T, cond, uncond, steps=steps, guidance=guidance)
