"""One pass over the pictures feeds every metric: features for the distance, embeddings for CLIP score and attributes.

A metric more is a field of `Instruments` and two lines of `Pass`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import embedded
from stepdistill.errors import InputError
from stepdistill.evaluation import hashes
from stepdistill.evaluation.attributes import Probes, accuracy, load_probes
from stepdistill.evaluation.clip import ClipModel, clip_scores, load_clip
from stepdistill.evaluation.features import Extractor, load_extractor
from stepdistill.evaluation.frechet import Moments, frechet_interval
from stepdistill.evaluation.protocols import Protocol
from stepdistill.evaluation.sets import EvalSet, open_set
from stepdistill.files import sha256

Progress = Callable[[int, int], None]  # pictures just done, of how many


@dataclass(frozen=True)
class Instruments:
    """What a protocol measures with, loaded.

    Attributes:
        prompts: the set that is drawn. extractor: features. reference: moments of the real pictures.
        clip: for the score, None where there is none. probes: of attributes, None where there are none.
        content: hashes of all of it, for the protocol's own.
    """

    prompts: EvalSet
    extractor: Extractor
    reference: Moments
    clip: ClipModel | None = None
    probes: Probes | None = None
    content: tuple[tuple[str, str], ...] = ()


def cache_folder() -> Path:
    """Where statistics are kept: $STEPDISTILL_CACHE, else ~/.cache/stepdistill."""
    return Path(os.environ.get("STEPDISTILL_CACHE") or Path.home() / ".cache" / "stepdistill")


def statistics_name(extractor: Extractor, reference: EvalSet, count: int) -> str:
    """The file of these moments, named by a hash of the extractor, its weights and resize, and the pictures."""
    key = hashlib.sha256(f"moments-1 {extractor.identity} {reference.key} {count}".encode()).hexdigest()[:16]
    return f"statistics-{key}.safetensors"


def reference_statistics(
    extractor: Extractor, reference: EvalSet, *, count: int | None = None, batch: int = 64, folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Moments:  # fmt: skip
    """The moments of a reference set's first `count` pictures: those that ship, those in the cache, or made now.

    Args:
        folder: to keep them in; the cache where not given. progress: told how many are done.
    """
    count = count or reference.count
    name = statistics_name(extractor, reference, count)
    kept = (folder or cache_folder() / "statistics") / name
    shipped = embedded.path("avatars") / name if reference.name.startswith("avatars") and folder is None else kept
    for file in (shipped, kept):
        if file.is_file():
            try:
                return Moments.load(file)
            except InputError:
                if file == shipped != kept:
                    raise
    try:  # before minutes of work, not after
        kept.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cache: got {kept.parent} ({error.strerror}); allowed: a folder that can be written; name one in "
            "STEPDISTILL_CACHE"
        ) from error
    moments = Moments.empty(extractor.dim)
    for _, pictures in reference.batches(batch, count):
        moments = moments + Moments.of(extractor(pictures))
        progress(len(pictures), count)
    moments.save(kept)
    return moments


def prepare(
    protocol: Protocol, *, device: str = "cpu", batch: int = 64, progress: Progress = lambda done, total: None
) -> Instruments:
    """Loads what a protocol names.

    Raises:
        InputError: fewer prompts than pictures, or a set, extractor or scorer that cannot be had.
    """
    prompts = open_set(protocol.prompts, protocol.size)
    if prompts.prompts is not None and prompts.count < protocol.n:
        raise InputError(
            f"protocol {protocol.name}: got {prompts.count} prompts for n={protocol.n}; lower n or add prompts"
        )
    same = protocol.reference == protocol.prompts
    reference = prompts if same else open_set(protocol.reference, protocol.size)
    if protocol.reference_n and protocol.reference_n > reference.count:
        raise InputError(
            f"protocol {protocol.name}: got reference_n={protocol.reference_n}; allowed: up to {reference.count}"
        )
    if reference.pictures is None:
        raise InputError(
            f"protocol {protocol.name}: got reference {protocol.reference}, which has no pictures; name a set that has"
        )
    settings = protocol.extractor
    extractor = load_extractor(settings.name, size=settings.size, resize=settings.resize, device=device)
    clip = probes = None
    content = {"prompts": prompts.key, "reference": reference.key, "extractor": extractor.identity}
    if protocol.scorer and prompts.prompts is not None:
        clip = load_clip(
            protocol.scorer.model, pretrained=protocol.scorer.pretrained, prefix=protocol.scorer.prefix, device=device
        )
        content["scorer"] = hashes.of_module(clip.model)
        if prompts.attributes is not None and clip.folder and (clip.folder / "probes.json").is_file():
            probes = load_probes(clip.folder)
            content["probes"] = sha256(clip.folder / "probes.safetensors")
    moments = reference_statistics(extractor, reference, count=protocol.reference_n, batch=batch, progress=progress)
    return Instruments(prompts, extractor, moments, clip, probes, tuple(sorted(content.items())))


class Pass:
    """Takes pictures batch by batch; `figures` gives the metric columns of a row."""

    def __init__(self, instruments: Instruments) -> None:
        self.tools = instruments
        self.features: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.tally: dict[str, tuple[int, int]] = {}

    def add(self, first: int, pictures: Tensor) -> None:
        """Pictures (B, 3, H, W) uint8, number `first` and on of the set."""
        tools, last = self.tools, first + len(pictures)
        self.features.append(tools.extractor(pictures).cpu())
        if tools.clip is None:
            return
        embedding = tools.clip.images(pictures)
        self.scores.append(clip_scores(embedding, tools.clip.texts(tools.prompts.prompts[first:last])).cpu())
        if tools.probes is not None:
            asked = tools.probes.count(
                embedding, tools.prompts.attributes[first:last], tools.prompts.mentioned[first:last]
            )
            for name, (right, n) in asked.items():
                old = self.tally.get(name, (0, 0))
                self.tally[name] = old[0] + right, old[1] + n

    def figures(self) -> dict[str, Any]:
        """fd with its interval, clip_score, attribute_accuracy and their names."""
        tools = self.tools
        distance, low, high = frechet_interval(torch.cat(self.features), tools.reference)
        score = torch.cat(self.scores).double().mean().item() if self.scores else None
        share = accuracy(self.tally) if tools.probes is not None else None
        return {
            "fd": round(distance, 4), "fd_low": round(low, 4), "fd_high": round(high, 4),
            "fd_extractor": tools.extractor.title,
            "clip_score": None if score is None else round(score, 4),
            "clip_model": tools.clip.title if tools.clip else None,
            "attribute_accuracy": None if share is None else round(share, 5),
            "attributes": {name: round(right / n, 4) for name, (right, n) in self.tally.items() if n} or None,
        }  # fmt: skip
