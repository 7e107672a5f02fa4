"""Evaluation sets by name: the prompts that images are generated for, and the real images they are compared with.

avatars:train, avatars:test    the embedded set
FOLDER                         images; with metadata.jsonl (file_name, text), or a .txt next to each, prompts too
FILE.txt                       one prompt per line, no images
none                           neither: for an unconditional model
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepdistill.data import sources
from stepdistill.errors import InputError
from stepdistill.evaluation.frame import Frame


@dataclass(frozen=True)
class EvalSet:
    """N prompts, images, or both, in a fixed order.

    Attributes:
        name: the name it was opened by. key: hash of the content. count: N.
        prompts: N sentences; None for images alone.
        pictures: (first, last) -> uint8 (B, 3, H, W); None for prompts alone.
        attributes, mentioned: each prompt's true attributes and those it names; None if unknown.
        size: the size or frame that its images were brought to; None if they are unchanged.
    """

    name: str
    key: str
    count: int
    prompts: Sequence[str] | None = None
    pictures: Callable[[int, int], Tensor] | None = None
    attributes: Sequence[Mapping[str, str]] | None = None
    mentioned: Sequence[Sequence[str]] | None = None
    size: int | Frame | None = None

    def batches(self, size: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (first, images) of the first `count` images, `size` at a time.

        Raises:
            InputError: there are no images, or fewer than `count`.
        """
        yield from zip(range(0, count, size), self.some(size, range(count)), strict=True)

    def some(self, size: int, numbers: Sequence[int]) -> Iterator[Tensor]:
        """Yields the images with these numbers, in order, `size` at a time.

        Raises:
            InputError: there are no images, or a number is out of range.
        """
        self.check(max(numbers, default=-1) + 1)
        for first in range(0, len(numbers), size):
            part = numbers[first : first + size]
            if part[-1] - part[0] == len(part) - 1:
                yield self.pictures(part[0], part[-1] + 1)
            else:
                with ThreadPoolExecutor() as pool:
                    yield torch.cat(list(pool.map(lambda number: self.pictures(number, number + 1), part)))

    def check(self, count: int) -> None:
        """Checks that there are at least `count` images.

        Raises:
            InputError: there are fewer.
        """
        if self.pictures is None or count > self.count:
            got = "no pictures" if self.pictures is None else f"{self.count} pictures"
            raise InputError(f"reference set {self.name}: got {got}; allowed: {count} or more; lower n or add pictures")


def open_set(name: str, size: int | Frame | None = None) -> EvalSet:
    """Opens a set by name.

    Args:
        size: side in pixels that a folder's images are resized to (shorter side, Lanczos, centre crop), or the frame
            that preprocesses them.

    Raises:
        InputError: no such set, or one that is empty or broken.
    """
    if name.split(":")[0] == "avatars":
        return _avatars(name.partition(":")[2] or "test", size if isinstance(size, Frame) else None)
    if name == "none":
        return EvalSet(name, _hash(name), 0)
    path = Path(name)
    if path.is_file() and path.suffix == ".txt":
        prompts = sources.read_prompts(path)
        return EvalSet(name, _hash("\n".join(prompts)), len(prompts), prompts)
    if path.is_dir():
        return _folder(path, size)
    raise InputError(
        f"set: got {name!r}; allowed: avatars:train, avatars:test, a folder of pictures, or a file.txt of prompts"
    )


def _hash(*parts: str | bytes) -> str:
    return _hash_of(parts)


def _hash_of(parts: Iterable[str | bytes]) -> str:
    """Hashes parts one by one; they need not fit into memory together."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _avatars(split: str, frame: Frame | None) -> EvalSet:
    from stepdistill.data import avatars

    data = avatars.load(split)
    frame_key = [f"frame {frame}"] if frame else []
    key = _hash(data.images.tobytes(), json.dumps([data.captions, data.attributes, data.mentioned]), *frame_key)

    def pictures(first: int, last: int) -> Tensor:
        batch = torch.from_numpy(data.images[first:last].copy()).permute(0, 3, 1, 2)
        return frame.batch(batch) if frame else batch

    return EvalSet(f"avatars:{split}", key, len(data), data.captions, pictures, data.attributes, data.mentioned, frame)


def listing(folder: str | Path) -> tuple[list[Path], list[str] | None]:
    """Lists the images of a folder and their captions, or None if there are none, in the same way as training does.

    Raises:
        InputError: it is not a folder, holds no images, or captions are missing for some images or empty.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"set: got {folder}, which is no folder; allowed: a folder of pictures; check the path")
    metadata = folder / "metadata.jsonl"
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in sources.PICTURES and f.is_file())
    captions = None
    if metadata.is_file() or any(f.with_suffix(".txt").is_file() for f in files):
        rows = sources.listed(metadata) if metadata.is_file() else sources.beside_pictures(folder)
        files, captions = [file for file, _ in rows], [caption for _, caption in rows]
        if bare := [file for file, caption in rows if not caption]:
            got = f"{bare[0]} with an empty caption, and {len(bare) - 1} more"
            raise InputError(f"set {folder}: got {got}; allowed: words for each picture; write them or take it out")
    if not files:
        raise InputError(f"set {folder}: got no pictures; allowed: {', '.join(sources.PICTURES)} files")
    return files, captions


def check_copy(folder: str | Path, count: int | None, size: int | None) -> None:
    """Checks, as far as possible, that a folder is the one that a published protocol compares with.

    Args:
        count, size: number of images, and their side in pixels; None is not checked.

    Raises:
        InputError: it holds more or fewer images, or one of another size.
    """
    files, _ = listing(folder)
    if count is not None and len(files) != count:
        raise InputError(
            f"reference: got {folder} of {len(files)} pictures; allowed: {count}, which the protocol compares with; "
            "unpack all of it, and nothing else"
        )
    for file in files if size is not None else ():
        if (found := sources.open_picture(file, str(file)).size) != (size, size):
            raise InputError(
                f"reference: got {file} of {found[0]} x {found[1]}; allowed: {size} x {size}, which the protocol "
                "compares; give its own pictures or statistics"
            )


def _folder(folder: Path, size: int | Frame | None) -> EvalSet:
    files, prompts = listing(folder)

    sizes: list[tuple[int, ...]] = []

    def pictures(first: int, last: int) -> Tensor:
        with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
            batch = list(pool.map(lambda file: _open(file, size), files[first:last]))
        sizes[:] = sizes[:1] or [tuple(batch[0].shape)]
        for file, picture in zip(files[first:last], batch, strict=True):
            if tuple(picture.shape) != sizes[0]:
                got = f"{file.name} of {_side(picture.shape)} among others of {_side(sizes[0])}"
                raise InputError(
                    f"set {folder}: got pictures of several sizes ({got}); allowed: one; give the protocol a size"
                )
        return torch.stack(batch)

    contents = (part for file in files for part in (file.name, file.read_bytes()))
    key = _hash_of(itertools.chain(contents, prompts or [], [f"size {size}"]))
    return EvalSet(str(folder), key, len(files), prompts, pictures, size=size)


def _open(file: Path, size: int | Frame | None) -> Tensor:
    picture = sources.open_picture(file, str(file))
    if isinstance(size, Frame):
        return torch.from_numpy(np.array(size(picture.convert("RGB")))).permute(2, 0, 1)
    side = (size, size) if size else picture.size[::-1]
    return sources.to_tensor(picture, side).add(1).mul(127.5).round().to(torch.uint8)


def _side(shape: Sequence[int]) -> str:
    return f"{shape[2]} x {shape[1]}"
