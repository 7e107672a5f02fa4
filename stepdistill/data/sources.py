"""Sources of training data: captions in a fixed order, and the image of each on demand.

avatars              the embedded set
FOLDER               images with metadata.jsonl (file_name, text), or a .txt next to each image
FOLDER/{0..9}.tar    webdataset shards: an image and a .txt or .json member per key; wildcards too
prompts.txt          one prompt per line, no images: the teacher generates them (data-free distillation)
owner/name           a `datasets` name, or a folder saved by `datasets`, with an image and a text column
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stepdistill.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEXT_COLUMNS = ("text", "caption", "prompt")
KINDS = "an image folder, prompts.txt, webdataset shards (.tar), a datasets name, a cache, or avatars"

Picture = Image.Image | np.ndarray


class PictureError(InputError):
    """An image that cannot be decoded; a file that cannot be read raises a plain InputError.

    Attributes:
        name: of the image. reason: in a few words.
    """

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name
        self.reason = str(error).partition(" '")[0].partition("\n")[0][:60] or type(error).__name__
        super().__init__(
            f"picture: got {name}, which is broken ({self.reason}); allowed: a whole one; replace or remove it"
        )


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order.

    Attributes:
        name: for messages.
        key: changes if the content does.
        captions: one per sample.
        picture: picture(i) returns the image of captions[i], or raises PictureError; None if there are only captions.
    """

    name: str
    key: str
    captions: list[str]
    picture: Callable[[int], Picture] | None

    def __len__(self) -> int:
        return len(self.captions)


def key_of(*parts: object) -> str:
    """Returns a short hash of printable values."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def open_source(spec: str) -> Source:
    """Opens the source that a `--data` value names.

    Raises:
        InputError: it names nothing, an empty source, or images without captions.
    """
    spec = str(spec)
    path = Path(spec).expanduser()
    if spec == "avatars":
        return _avatars()
    if spec.endswith(".tar"):
        return _shards(spec)
    if path.is_file() and path.suffix == ".txt":
        return _prompts(path)
    if path.is_dir():
        saved = any((path / name).exists() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))
        return _table(str(path)) if saved else _folder(path)
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        what = "neither a folder, a .txt nor a .tar" if path.exists() else "which does not exist"
        raise InputError(f"--data: got {spec}, {what}; allowed: {KINDS}")
    return _table(spec)


def _avatars() -> Source:
    from stepdistill.data import avatars

    data = avatars.load("train")
    key = key_of("avatars", hashlib.sha256(data.images.tobytes()).hexdigest(), *data.captions)
    return Source("avatars", key, data.captions, lambda i: data.images[i])


# ----------------------------------------------------------------------------------------------------------- folders


def _folder(folder: Path) -> Source:
    metadata = folder / "metadata.jsonl"
    rows = listed(metadata) if metadata.exists() else beside_pictures(folder)
    if not rows:
        shards = f"; for its shards give {folder / '*.tar'}" if any(folder.glob("*.tar")) else ""
        raise InputError(
            f"--data: got {folder}, which holds no pictures; allowed: {', '.join(PICTURES)} with captions{shards}"
        )
    stamps = [(f.relative_to(folder), f.stat().st_size, f.stat().st_mtime_ns, caption) for f, caption in rows]
    files = [file for file, _ in rows]
    captions = [caption for _, caption in rows]
    return Source(str(folder), key_of("folder", *stamps), captions, lambda i: open_picture(files[i], str(files[i])))


def listed(metadata: Path) -> list[tuple[Path, str]]:
    """Returns the images and captions that metadata.jsonl lists. Names outside its folder are rejected."""
    rows = []
    for number, line in enumerate(_text(metadata).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{metadata} line {number}"
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["text"]
            if not isinstance(name, str) or not isinstance(caption, str):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            allowed = '{"file_name": "…", "text": "…"}'
            raise InputError(f"{where}: got {line[:60]!r}; allowed: {allowed}; add the caption") from error
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        if not inside or not (metadata.parent / name).is_file():
            what = "which is not there" if inside else "which leads out of the folder"
            raise InputError(
                f"{where}: got file_name {name}, {what}; allowed: files in {metadata.parent}; fix the line"
            )
        rows.append((metadata.parent / name, caption.strip()))
    return rows


def beside_pictures(folder: Path) -> list[tuple[Path, str]]:
    """Returns every image below the folder with the caption from the .txt next to it."""
    rows = []
    for file in sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES and f.is_file()):
        caption = file.with_suffix(".txt")
        if not caption.exists():
            raise InputError(
                f"captions: got none for {file}; allowed: metadata.jsonl with file_name and text, or a .txt beside "
                "each picture; write one"
            )
        rows.append((file, _text(caption).strip()))
    return rows


def _text(file: Path) -> str:
    """Returns the content of a text file."""
    try:
        return file.read_text(encoding="utf-8-sig")  # drops a byte order mark
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise InputError(f"text: got {file}, whose {byte}; allowed: UTF-8; save it as such") from error
    except OSError as error:
        raise InputError(f"text: got {file} ({error.strerror}); allowed: a file that can be read") from error


def read_prompts(path: str | Path) -> list[str]:
    """Returns the prompts of a text file, one per line. A prompt may contain what str.splitlines takes for a line end.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    return [line.strip() for line in _text(Path(path)).split("\n") if line.strip()]


def _prompts(path: Path) -> Source:
    prompts = read_prompts(path)
    if not prompts:
        raise InputError(f"--data: got {path}, which has no prompts; allowed: a prompt a line; write some")
    return Source(str(path), key_of("prompts", *prompts), prompts, None)


# ------------------------------------------------------------------------------------------------ webdataset shards


def _shards(pattern: str) -> Source:
    """Shards are indexed once, then read by offset. Nothing is extracted; only images, .txt and .json are read."""
    files = _expanded(os.path.expanduser(pattern))
    samples: list[tuple[Path, int, int, str]] = []
    captions: list[str] = []
    for file in files:
        for key, members in _indexed(file).items():
            picture = next((members[e] for e in PICTURES if e in members), None)
            caption = _caption(file, members)
            if picture is None and not members.keys() & {".txt", ".json"}:
                continue
            if picture is None or caption is None:
                missing = "picture" if picture is None else "caption"
                raise InputError(
                    f"shard {file}: got sample {key} without a {missing}; allowed: a picture with a .txt, or a .json "
                    "with text; fix it"
                )
            samples.append((file, *picture, key))
            captions.append(caption)
    if not samples:
        raise InputError(f"--data: got {pattern}, which holds no pictures; allowed: pictures with .txt or .json")

    def picture(i: int) -> Image.Image:
        file, start, size, key = samples[i]
        return open_picture(io.BytesIO(_bytes(file, start, size)), f"{key} in {file}")

    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return Source(pattern, key_of("shards", *stamps), captions, picture)


def _expanded(pattern: str) -> list[Path]:
    if "{" in pattern:
        from braceexpand import UnbalancedBracesError, braceexpand

        try:
            names = list(braceexpand(pattern))
        except UnbalancedBracesError as error:
            raise InputError(f"--data: got {pattern}, whose braces do not match; allowed: {{0..9}}.tar") from error
    else:
        names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    missing = [name for name in names if not Path(name).is_file()]
    if missing or not names:
        raise InputError(
            f"--data: got {pattern}, of which {(missing or ['nothing'])[0]} is not there; allowed: local .tar files; "
            "check the pattern"
        )
    return [Path(name) for name in names]


def _indexed(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Returns key -> extension -> (offset, size in bytes) of images, .txt and .json."""
    index: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise InputError(
                        f"shard {file}: got member {member.name}, which leads out of the archive; allowed: plain "
                        "names; make it again"
                    )
                stem, dot, extension = path.name.partition(".")
                extension = (dot + extension).lower()
                if stem and member.isreg() and extension in (*PICTURES, ".txt", ".json"):
                    place = (member.offset_data, member.size)
                    index.setdefault(str(path.with_name(stem)), {})[extension] = place
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(
            f"shard {file}: got {str(error)[:60] or 'no archive'}; allowed: an uncompressed, whole .tar; fetch or "
            "unpack it again"
        ) from error
    return index


def _bytes(file: Path, start: int, size: int) -> bytes:
    with open(file, "rb") as shard:
        shard.seek(start)
        return shard.read(size)


def _caption(file: Path, members: dict[str, tuple[int, int]]) -> str | None:
    if ".txt" in members:
        return _bytes(file, *members[".txt"]).decode("utf-8-sig", "replace").strip()
    if ".json" not in members:
        return None
    try:
        row = json.loads(_bytes(file, *members[".json"]))
    except ValueError:
        return None
    return next((row[c] for c in TEXT_COLUMNS if isinstance(row.get(c), str)), None) if isinstance(row, dict) else None


# --------------------------------------------------------------------------------------------------------- `datasets`


def _table(name: str) -> Source:
    import datasets

    try:
        table = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
        table = table["train"] if isinstance(table, dict) else table
    except Exception as error:  # datasets raises a dozen types; all mean that loading failed
        reason = next(iter(str(error).splitlines()), "")[:100]
        raise InputError(
            f"--data: got {name}, which is no folder or file here and could not be loaded as a dataset ({reason}); "
            f"allowed: {KINDS}; check the name or the network"
        ) from error
    column = next((c for c in TEXT_COLUMNS if c in table.column_names), None)
    if column is None or "image" not in table.column_names:
        raise InputError(
            f"--data: got columns {', '.join(table.column_names)} in {name}; allowed: image and one of "
            f"{', '.join(TEXT_COLUMNS)}; rename them"
        )
    captions = list(table[column])
    if not captions or not all(isinstance(caption, str) for caption in captions):
        got = "no rows" if not captions else "rows without a caption"
        raise InputError(f"--data: got {got} in {name}; allowed: a string in {column} of each row; filter it first")

    def picture(i: int) -> Image.Image:
        return _whole(lambda: table[i]["image"], f"row {i} of {name}")

    return Source(name, key_of("datasets", name, table._fingerprint), captions, picture)


# ----------------------------------------------------------------------------------------------------------- pictures


def upright(picture: Image.Image) -> Image.Image:
    """Returns the image in RGB, rotated by its EXIF orientation; of several frames the first.

    16-bit greyscale is scaled to 8 bits, where Pillow would clip all values above 255. Transparency is dropped, as
    FID's tools do.

    Raises:
        ValueError: its pixels are floating point numbers, of unknown range.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("pixels of floating point")
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    return picture.convert("RGB")


def open_picture(file: Path | io.BytesIO, name: str) -> Image.Image:
    """Opens an image from a file, upright and RGB.

    Raises:
        PictureError: it cannot be decoded.
        InputError: its file cannot be read.
    """
    return _whole(lambda: Image.open(file), name)


def _whole(opened: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        return upright(opened())
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types (struct.error, EOFError, ...); all mean the same
        if getattr(error, "errno", None):  # an OS error: the storage failed, maybe temporarily, not the image
            reason = os.strerror(error.errno)
            raise InputError(
                f"picture: got {name}, which cannot be read ({reason}); allowed: a file of yours; fix it"
            ) from error
        raise PictureError(name, error) from error


def to_tensor(picture: Picture, size: tuple[int, int], channels: int = 3) -> Tensor:
    """Resizes (shorter side, Lanczos) and centre-crops an image: (channels, height, width) in [-1, 1]."""
    pixels = torch.from_numpy(fitted(picture, size, channels)).permute(2, 0, 1)
    return pixels.float().div(127.5).sub(1)


def fitted(picture: Picture, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """The same as (height, width, channels) uint8."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    if channels == 1:
        picture = picture.convert("L")
    height, width = size
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.array(picture).reshape(height, width, channels)
