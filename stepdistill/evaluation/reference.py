"""Moments of the real images: shipped, cached, computed now, or read from a file of statistics that the user gives."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stepdistill import embedded
from stepdistill.errors import InputError
from stepdistill.evaluation.features import Extractor
from stepdistill.evaluation.frechet import Moments
from stepdistill.evaluation.progress import say
from stepdistill.evaluation.protocols import Protocol
from stepdistill.evaluation.real import Progress, RealPictures, writable
from stepdistill.evaluation.sets import EvalSet
from stepdistill.evaluation.statistics import Origin, framed, load_statistics, read_statistics, save_statistics
from stepdistill.files import cache_folder, sha256

FOREIGN = "foreign: of which pictures, extractor and resize cannot be seen"  # recorded for statistics without origin


def statistics_name(extractor: Extractor, reference: EvalSet, count: int) -> str:
    """Returns the file name of these moments: a hash of the extractor, its weights and resize, and the images."""
    key = hashlib.sha256(f"moments-1 {extractor.identity} {reference.key} {count}".encode()).hexdigest()[:16]
    return f"statistics-{key}.safetensors"


def origin_of(extractor: Extractor, reference: EvalSet, count: int) -> Origin:
    """Returns the origin recorded with the statistics of a set's first `count` images."""
    return Origin(extractor.identity, framed(reference.size), reference.key, count)


def reference_statistics(
    extractor: Extractor, reference: EvalSet, *, count: int | None = None, batch: int = 64, folder: Path | None = None,
    progress: Progress = lambda done, total: None, known: RealPictures | None = None,
) -> Moments:  # fmt: skip
    """Returns the moments of a reference set's first `count` images: shipped, cached, or computed now.

    Args:
        folder: where they are stored; by default the cache. progress: called with (images just done, total).
        known: real images of the same set whose features are needed anyway, to be reused.
    """
    count = count or reference.count
    name = statistics_name(extractor, reference, count)
    cached = (folder or cache_folder() / "statistics") / name
    shipped = embedded.path("avatars") / name if reference.name.startswith("avatars") and folder is None else cached
    origin = origin_of(extractor, reference, count)
    for file in (shipped, cached):
        if file.is_file():
            try:
                moments, found = load_statistics(file)
                origin.check(found or Origin("not recorded"), file, "delete it and it is made again")
                return moments
            except InputError as error:
                if file == shipped != cached:
                    raise
                say(f"{error}: computing it again")
    writable(cached.parent)
    moments, seen = Moments.empty(extractor.dim), set()
    if known is not None:
        moments, seen = Moments.of(known.features), set(known.numbers)
    for pictures in reference.some(batch, [number for number in range(count) if number not in seen]):
        moments = moments + Moments.of(extractor(pictures))
        progress(len(pictures), count)
    save_statistics(cached, moments, origin)
    return moments


def load_reference(
    protocol: Protocol, extractor: Extractor, real: RealPictures | None, *, known: bool = False
) -> tuple[Moments, dict[str, str]]:
    """Returns the moments of a protocol's real images, and what they are of, for the protocol's hash: statistics that
    record their images are the images' equal.

    Args:
        real: the images; None if the protocol names a file of statistics. known: their features are needed anyway.

    Raises:
        InputError: the file is none of statistics, or they are of something else than the protocol needs.
    """
    if real is not None:
        moments = reference_statistics(
            extractor, real.reference, count=real.count, batch=real.batch, progress=real.progress,
            known=real if known else None,
        )  # fmt: skip
        return moments, {"reference": real.reference.key}
    wanted = Origin(extractor.identity, framed(protocol.frame or protocol.size), None, protocol.reference_n)
    moments, origin = read_statistics(protocol.reference, wanted, extractor.dim)
    if origin is None:
        return moments, {"reference": sha256(protocol.reference), "statistics": FOREIGN}
    return moments, {"reference": origin.pictures or sha256(protocol.reference)}
