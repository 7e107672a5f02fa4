"""What the instruments see in the real pictures, made when a metric first asks and kept under a hash of its content.

    real = RealPictures(open_set("avatars:train"), extractor, few=2000, count=20000)
    real.features        # (2000, D): from the cache where they are, else made and kept there

Features and embeddings are of as many real pictures as are drawn of a model: that is how the tools compare, and all
pairs of a large set would take hours. Which ones is drawn by a fixed seed, for the first of a folder are of one kind.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation import arrays
from stepdistill.evaluation.clip import ClipModel
from stepdistill.evaluation.features import Extractor
from stepdistill.evaluation.progress import say
from stepdistill.evaluation.resize import resize
from stepdistill.evaluation.sets import EvalSet

Progress = Callable[[int, int], None]  # pictures just done, of how many
SIDE = 32  # of the small pictures that copies are looked for in
SEED = 0  # of which real pictures have features and embeddings, where not all have


def cache_folder() -> Path:
    """Where statistics are kept: $STEPDISTILL_CACHE, else ~/.cache/stepdistill."""
    return Path(os.environ.get("STEPDISTILL_CACHE") or Path.home() / ".cache" / "stepdistill")


def writable(folder: Path) -> Path:
    """The folder, made where it is not there: before minutes of work, not after.

    Raises:
        InputError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cache: got {folder} ({error.strerror}); allowed: a folder that can be written; name one in "
            "STEPDISTILL_CACHE"
        ) from error
    return folder


def small(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) uint8 at 32 x 32, antialiased, (B, 3072) uint8."""
    return resize(pictures, SIDE, "bilinear").round().to(torch.uint8).flatten(1)


@dataclass(frozen=True, eq=False)
class RealPictures:
    """A reference set through the instruments.

    Attributes:
        reference: the set. extractor: of features. clip: of embeddings, None where there is none.
        clip_key: hash of CLIP's weights. for_clip: the set as CLIP is to see it, where it has a frame of its own.
        count: how many are compared with, from the first. few: how many of these have features and embeddings.
        batch: pictures at a time. folder: to keep arrays in; the cache where None. progress: told how many are done.
    """

    reference: EvalSet
    extractor: Extractor
    few: int
    count: int
    clip: ClipModel | None = None
    clip_key: str = ""
    batch: int = 64
    folder: Path | None = None
    progress: Progress = lambda done, total: None
    for_clip: EvalSet | None = None

    @cached_property
    def numbers(self) -> list[int]:
        """Which `few` of the `count` have features and embeddings, in order."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(SEED))
        return order[: self.few].sort().values.tolist()

    @cached_property
    def features(self) -> Tensor:
        """(few, D) float32 of the extractor."""
        what = f"features-2 {self.extractor.identity} {self.few} of {self.count}"
        return self.kept("features", what, lambda: self._seen(self.extractor, self.numbers))

    @cached_property
    def embeddings(self) -> Tensor:
        """(few, E) float32, unit length, of CLIP."""
        clip = self.clip
        seen = f"{clip.title} {clip.size} {clip.mean} {clip.std} {clip.frame}"
        what = f"embeddings-3 {self.clip_key} {seen} {self.few} of {self.count}"
        given = self.for_clip or self.reference
        return self.kept("embeddings", what, lambda: self._seen(self.clip.images, self.numbers, given), given)

    @cached_property
    def pixels(self) -> Tensor:
        """(count, 3072) uint8, at 32 x 32."""
        return self.kept("pixels", f"pixels-1 {self.count}", lambda: self._seen(small, range(self.count)))

    def kept(self, name: str, what: str, make: Callable[[], Tensor], given: EvalSet | None = None) -> Tensor:
        """An array about this set: from the cache, else made and kept; made again where the file is damaged.

        Args:
            name: of the file, to people. what: all that it depends on besides the pictures. given: these, where they
                are not the reference's.
        """
        key = hashlib.sha256(f"{what} {(given or self.reference).key}".encode()).hexdigest()[:16]
        file = writable(self.folder or cache_folder() / "statistics") / f"{name}-{key}.safetensors"
        if file.is_file():
            try:
                return arrays.load(file)[0]["array"]
            except (InputError, KeyError) as error:
                say(f"{error}: it is being made again")
        array = make()
        arrays.save(file, {"array": array})
        return array

    def _seen(self, see: Callable[[Tensor], Tensor], numbers: Sequence[int], given: EvalSet | None = None) -> Tensor:
        parts = []
        for pictures in (given or self.reference).some(self.batch, numbers):
            parts.append(see(pictures).cpu())
            self.progress(len(pictures), len(numbers))
        return torch.cat(parts)
