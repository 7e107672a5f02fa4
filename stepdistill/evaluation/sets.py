"""The prompts that are drawn and the real pictures that are compared with, by name.

avatars:train, avatars:test    the embedded set
FOLDER                         pictures; with metadata.jsonl (file_name, text) they have prompts too
FILE.txt                       a prompt a line, no pictures
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class EvalSet:
    """N prompts, pictures, or both, in a fixed order.

    Attributes:
        name: what it was asked for by. key: changes when the content does. count: N.
        prompts: N sentences; None for pictures alone.
        pictures: (first, last) -> uint8 (B, 3, H, W); None for prompts alone.
        attributes, mentioned: the truth of each prompt and what it names; None where not known.
    """

    name: str
    key: str
    count: int
    prompts: Sequence[str] | None = None
    pictures: Callable[[int, int], Tensor] | None = None
    attributes: Sequence[Mapping[str, str]] | None = None
    mentioned: Sequence[Sequence[str]] | None = None

    def batches(self, size: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """(first, pictures) of the first `count`, `size` at a time.

        Raises:
            InputError: there are no pictures, or fewer than `count`.
        """
        if self.pictures is None or count > self.count:
            got = "no pictures" if self.pictures is None else f"{self.count} pictures"
            raise InputError(f"reference set {self.name}: got {got}; allowed: {count} or more; lower n or add pictures")
        for first in range(0, count, size):
            yield first, self.pictures(first, min(first + size, count))


def open_set(name: str) -> EvalSet:
    """A set by name.

    Raises:
        InputError: no such set, or one that is empty or broken.
    """
    if name.split(":")[0] == "avatars":
        return _avatars(name.partition(":")[2] or "test")
    path = Path(name)
    if path.is_file() and path.suffix == ".txt":
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        return EvalSet(name, _hash("\n".join(prompts)), len(prompts), prompts)
    if path.is_dir():
        return _folder(path)
    raise InputError(
        f"set: got {name!r}; allowed: avatars:train, avatars:test, a folder of pictures, or a file.txt of prompts"
    )


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _avatars(split: str) -> EvalSet:
    from stepdistill.data import avatars

    data = avatars.load(split)
    key = _hash(data.images.tobytes(), json.dumps([data.captions, data.attributes, data.mentioned]))

    def pictures(first: int, last: int) -> Tensor:
        return torch.from_numpy(data.images[first:last].copy()).permute(0, 3, 1, 2)

    return EvalSet(f"avatars:{split}", key, len(data), data.captions, pictures, data.attributes, data.mentioned)


def _folder(folder: Path) -> EvalSet:
    metadata = folder / "metadata.jsonl"
    prompts = None
    if metadata.is_file():
        try:
            rows = [json.loads(line) for line in metadata.read_text().splitlines() if line.strip()]
            files, prompts = [folder / row["file_name"] for row in rows], [row["text"] for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{metadata}: got a line that is not a file_name and a text ({error}); mend it") from error
    else:
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES)
    if not files or (missing := next((f for f in files if not f.is_file()), None)):
        got = f"{missing.name}, which is not there" if files else "no pictures"
        raise InputError(f"set {folder}: got {got}; allowed: {', '.join(PICTURES)} files")

    def pictures(first: int, last: int) -> Tensor:
        batch = [_open(file) for file in files[first:last]]
        if len({tuple(picture.shape) for picture in batch}) > 1:
            raise InputError(f"set {folder}: got pictures of several sizes; allowed: one size; resize them first")
        return torch.stack(batch)

    key = _hash(*(part for file in files for part in (file.name, file.read_bytes())), *(prompts or []))
    return EvalSet(str(folder), key, len(files), prompts, pictures)


def _open(file: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"picture {file}: could not be read ({str(error)[:80]}); replace or remove it") from error
