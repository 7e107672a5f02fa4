"""Where training pictures and captions come from: each source is an iterator of (picture or None, caption).

    avatars              the embedded set
    FOLDER               pictures with metadata.jsonl (file_name, text), or a .txt beside each picture
    FOLDER/{0..9}.tar    webdataset shards: a picture and a .txt or .json member for each key
    prompts.txt          a prompt a line and no pictures: the teacher paints them (data-free distillation)
    owner/name           a `datasets` name, or a folder saved by `datasets`, with an image and a text column
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stepdistill.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEXT_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order.

    Attributes:
        name: for messages.
        key: changes when the content does.
        count: how many; None where that is known only at the end.
        samples: starts a new pass.
    """

    name: str
    key: str
    count: int | None
    samples: Callable[[], Iterator[tuple[Image.Image | np.ndarray | None, str]]]


def key_of(*parts: object) -> str:
    """A short hash of anything printable."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def open_source(spec: str) -> Source:
    """The source a `--data` value names.

    Raises:
        InputError: it names nothing, or something empty, or pictures without captions.
    """
    path = Path(spec)
    if spec == "avatars":
        return _avatars()
    if spec.endswith((".tar", ".tar.gz", ".tgz")):
        return _shards(spec)
    if path.is_file() and path.suffix == ".txt":
        return _prompts(path)
    if path.is_dir():
        return _hub(spec) if (path / "dataset_info.json").exists() or (path / "state.json").exists() else _folder(path)
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise InputError(f"--data: got {spec}, which is no folder, .txt or .tar; allowed: an image folder, prompts.txt, "
                         "webdataset shards, a datasets name, a cache, or avatars")  # fmt: skip
    return _hub(spec)


def _avatars() -> Source:
    from stepdistill.data import avatars

    data = avatars.load("train")
    key = key_of("avatars", hashlib.sha256(data.images.tobytes()).hexdigest(), *data.captions)
    return Source("avatars", key, len(data), lambda: zip(data.images, data.captions, strict=True))


def _folder(folder: Path) -> Source:
    rows: list[tuple[Path, str]] = []
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        for number, line in enumerate(metadata.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append((folder / row["file_name"], row["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f'{metadata} line {number}: got {line[:60]!r}; allowed: {{"file_name": …, "text": …}}') from error
    else:
        for file in sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES):
            caption = file.with_suffix(".txt")
            if not caption.exists():
                raise InputError(f"captions: got none for {file}; allowed: metadata.jsonl with file_name and text, or a "
                                 ".txt beside each picture")  # fmt: skip
            rows.append((file, caption.read_text().strip()))
    if not rows:
        raise InputError(f"--data: got {folder}, which holds no pictures; allowed: {', '.join(PICTURES)} with captions")
    for file, _ in rows:
        if not file.is_file() or folder.resolve() not in file.resolve().parents:
            raise InputError(f"{metadata}: got file_name {file.name}, which is not in {folder}; add it or drop the line")

    def samples() -> Iterator:
        for file, caption in rows:
            yield open_picture(file, str(file)), caption

    stamps = [(f.relative_to(folder), f.stat().st_size, f.stat().st_mtime_ns, c) for f, c in rows]
    return Source(str(folder), key_of("folder", *stamps), len(rows), samples)


def open_picture(file: Path | io.BytesIO, name: str) -> Image.Image:
    """A picture, turned upright, RGB.

    Raises:
        InputError: it cannot be decoded.
    """
    try:
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"picture: got {name}, which is broken ({str(error)[:60]}); replace or remove it") from error


def _prompts(path: Path) -> Source:
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"--data: got {path}, which has no prompts; allowed: a prompt a line")
    return Source(str(path), key_of("prompts", *prompts), len(prompts), lambda: ((None, p) for p in prompts))


def _shards(pattern: str) -> Source:
    try:
        import braceexpand
        import webdataset
    except ImportError as error:
        raise InputError("--data: got webdataset shards; that needs the extra `data`: pip install 'stepdistill[data]'") from error
    files = list(braceexpand.braceexpand(pattern))
    if missing := [f for f in files if not Path(f).is_file()]:
        raise InputError(f"--data: got shard {missing[0]}, which does not exist; check the pattern {pattern}")

    def samples() -> Iterator:
        # Members are read as bytes and only pictures, .txt and .json are looked at: nothing is unpickled or extracted.
        for sample in webdataset.WebDataset(files, shardshuffle=False, empty_check=False):
            picture = next((sample[e[1:]] for e in PICTURES if e[1:] in sample), None)
            caption = sample["txt"].decode() if "txt" in sample else _json_caption(sample.get("json"))
            if picture is None or caption is None:
                raise InputError(f"shard sample {sample['__key__']}: got {sorted(k for k in sample if k[0] != '_')}; "
                                 "allowed: a picture with .txt, or .json with text")  # fmt: skip
            yield open_picture(io.BytesIO(picture), sample["__key__"]), caption

    stamps = [(f, Path(f).stat().st_size, Path(f).stat().st_mtime_ns) for f in files]
    return Source(pattern, key_of("shards", *stamps), None, samples)


def _json_caption(data: bytes | None) -> str | None:
    if data is None:
        return None
    row = json.loads(data)
    return next((row[c] for c in TEXT_COLUMNS if isinstance(row.get(c), str)), None) if isinstance(row, dict) else None


def _hub(name: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"--data: got {name}, a datasets name; that needs the extra `data`: pip install "
                         "'stepdistill[data]'") from error  # fmt: skip
    try:
        table = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split="train")
    except Exception as error:  # datasets raises a dozen kinds; all mean that it cannot be had
        reason = str(error).splitlines()[0][:100]
        raise InputError(f"--data: got {name}, which is no folder and could not be loaded as a dataset ({reason}); check "
                         "the name or the network") from error  # fmt: skip
    if isinstance(table, dict):
        table = table["train"]
    text = next((c for c in TEXT_COLUMNS if c in table.column_names), None)
    if text is None or "image" not in table.column_names:
        raise InputError(f"--data: got columns {', '.join(table.column_names)} in {name}; allowed: image and one of "
                         f"{', '.join(TEXT_COLUMNS)}")  # fmt: skip
    return Source(name, key_of("datasets", name, table._fingerprint), len(table),
                  lambda: ((row["image"].convert("RGB"), row[text]) for row in table))  # fmt: skip


def to_tensor(picture: Image.Image | np.ndarray, size: tuple[int, int]) -> Tensor:
    """A picture resized (shorter side, Lanczos) and cropped in the centre: (3, height, width) float32 in [-1, 1]."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    height, width = size
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(127.5).sub(1)
