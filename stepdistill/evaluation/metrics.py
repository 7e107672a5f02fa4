"""One pass over the images feeds every metric: features for the distance, embeddings for CLIP score and attributes.

The metrics are in `measures/`, one file each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import embedded
from stepdistill.errors import InputError
from stepdistill.evaluation import hashes
from stepdistill.evaluation.attributes import Probes, load_probes
from stepdistill.evaluation.clip import ClipModel, load_clip
from stepdistill.evaluation.features import Extractor, load_extractor
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.frame import Frame
from stepdistill.evaluation.frechet import Moments
from stepdistill.evaluation.measures import METRICS, View
from stepdistill.evaluation.progress import say
from stepdistill.evaluation.protocols import Protocol, with_data
from stepdistill.evaluation.real import Progress, RealPictures, writable
from stepdistill.evaluation.sets import EvalSet, open_set
from stepdistill.evaluation.statistics import Origin, are_statistics, framed, keep, kept, read_statistics
from stepdistill.files import cache_folder, sha256

FOREIGN = "foreign: of which pictures, extractor and resize cannot be seen"  # recorded for statistics without origin


@dataclass(frozen=True)
class Instruments:
    """Everything that a protocol measures with, loaded.

    Attributes:
        prompts: the set to generate. extractor: computes features. reference: moments of the real images.
        clip: the scorer, or None. probes: for attributes, or None.
        content: hashes of all of these, which enter the protocol's hash. metrics: names in `measures.METRICS`.
        real: what else metrics need of the real images; None if only moments are available.
        frame: applied to images before the networks, or None. texts: cached CLIP embeddings of prompts.
    """

    prompts: EvalSet
    extractor: Extractor
    reference: Moments
    clip: ClipModel | None = None
    probes: Probes | None = None
    content: tuple[tuple[str, str], ...] = ()
    metrics: tuple[str, ...] = ("fd", "clip", "attributes")
    real: RealPictures | None = None
    frame: Frame | None = None
    texts: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)


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
                moments, found = kept(file)
                origin.check(found or Origin("not said"), file, "delete it and it is made again")
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
    keep(cached, moments, origin)
    return moments


def prepare(
    protocol: Protocol, *, device: str = "cpu", batch: int = 64, progress: Progress = lambda done, total: None
) -> Instruments:
    """Loads the instruments that a protocol names.

    Raises:
        InputError: there are fewer prompts than images, too few images for a metric, or a set, extractor or scorer is
            not available.
    """
    protocol = with_data(protocol, None, None)
    size = protocol.frame or protocol.size
    prompts = open_set(protocol.prompts, size)
    if prompts.prompts is not None and prompts.count < protocol.n:
        raise InputError(
            f"protocol {protocol.name}: got {prompts.count} prompts for n={protocol.n}; lower n or add prompts"
        )
    same, given = protocol.reference == protocol.prompts, are_statistics(protocol.reference)
    reference = prompts if same else open_set("none" if given else protocol.reference, size)
    if protocol.reference_n and protocol.reference_n > reference.count and not given:
        raise InputError(
            f"protocol {protocol.name}: got reference_n={protocol.reference_n}; allowed: up to {reference.count}"
        )
    if reference.pictures is None and not given:
        raise InputError(
            f"protocol {protocol.name}: got reference {protocol.reference}, which has no pictures; name a set that has"
        )
    settings = protocol.extractor
    extractor = load_extractor(settings.name, size=settings.size, resize=settings.resize, device=device)
    clip = probes = None
    content = {"prompts": prompts.key, "reference": reference.key, "extractor": extractor.identity}
    if protocol.scorer and prompts.prompts is not None:
        scorer = protocol.scorer
        clip = load_clip(scorer.model, pretrained=scorer.pretrained, prefix=scorer.prefix, device=device)
        clip = dataclasses.replace(clip, scale=scorer.scale, frame=scorer.frame)
        content["scorer"] = hashes.of_module(clip.model)
        if scorer.model != "avatars":  # whose setup ships with the package
            content["scorer setup"] = clip.setup
        if prompts.attributes is not None and clip.folder and (clip.folder / "probes.json").is_file():
            probes = load_probes(clip.folder)
            content["probes"] = sha256(clip.folder / "probes.safetensors")
    listed, count = [], protocol.reference_n or reference.count
    for name in protocol.metrics:
        metric = METRICS[name]
        if protocol.n < math.ceil(metric.per_feature * extractor.dim):
            say(
                f"{name} is omitted: got n={protocol.n}; it needs {metric.per_feature:g} images for each of "
                f"{extractor.title}'s {extractor.dim} features"
            )
            continue
        if protocol.n < (least := metric.least):
            got = f"n={protocol.n} with the metric {name}"
            raise InputError(f"protocol {protocol.name}: got {got}; allowed: {least} or more; raise n")
        if metric.needs and not given and count < least:
            raise InputError(
                f"protocol {protocol.name}: got a reference of {count} pictures with the metric {name}; allowed: "
                f"{least} or more; add pictures"
            )
        content |= metric.prepare(device) | ({f"{name} revision": str(metric.revision)} if metric.revision > 1 else {})
        listed.append(name)
    real = None
    if given:
        wanted = Origin(extractor.identity, framed(size), None, protocol.reference_n)
        moments, own = read_statistics(protocol.reference, wanted, extractor.dim)
        content["reference"] = sha256(protocol.reference)
        if not own:
            content["statistics"] = FOREIGN
    else:
        few, key = min(protocol.n, count), content.get("scorer", "")
        needs = {need for name in listed for need in METRICS[name].needs}
        apart = clip is not None and clip.frame is not None and "embeddings" in needs
        for_clip = open_set(protocol.reference, clip.frame) if apart else None
        real = RealPictures(
            reference, extractor, few, count, clip, key, batch, progress=progress, for_clip=for_clip
        )  # fmt: skip
        moments = reference_statistics(
            extractor, reference, count=count, batch=batch, progress=progress,
            known=real if "features" in needs else None,
        )  # fmt: skip
    content = tuple(sorted(content.items()))
    return Instruments(prompts, extractor, moments, clip, probes, content, tuple(listed), real, protocol.frame)


class Pass:
    """Receives images batch by batch; `figures` then computes the protocol's metrics over all of them.

    Attributes:
        kept: what metrics keep of each batch, by the number of its first image. Other processes' parts are merged in.

    Args:
        each: images per prompt; feeds the metrics that need this many.
    """

    def __init__(self, instruments: Instruments, each: int = 1) -> None:
        self.tools, self.each = instruments, each
        listed = [METRICS[name] for name in instruments.metrics]
        self.metrics = [metric for metric in listed if metric.each == each and metric.fits(instruments)]
        self.kept: dict[int, dict[str, Tensor]] = {}

    def add(self, first: int, pictures: Tensor) -> None:
        """Adds images (B, 3, H, W) uint8, from number `first` of the set on."""
        view = View(self.tools, first, pictures, self.each)
        seen = {metric.keeps: metric.see for metric in self.metrics}
        self.kept[first] = {keeps: see(view).cpu() for keeps, see in seen.items()}

    def figures(self) -> dict[str, Figure]:
        """Computes all figures by name, independently of the order in which batches were added."""
        parts = [self.kept[first] for first in sorted(self.kept)]
        whole = {metric.keeps: torch.cat([part[metric.keeps] for part in parts]) for metric in self.metrics}
        found: dict[str, Figure] = {}
        for metric in self.metrics:
            found |= metric.figures(whole[metric.keeps], self.tools)
        return found


def row_of(found: Mapping[str, Figure], tools: Instruments) -> dict[str, Any]:
    """Returns a row's metric columns: the main figures as columns, and all figures with intervals in `metrics`."""
    score, share = found.get("clip_score"), found.get("attribute_accuracy")
    row: dict[str, Any] = {"fd": None, "fd_low": None, "fd_high": None}
    if "fd" in found:
        low, high = found["fd"].interval()
        row = {"fd": round(found["fd"].value, 4), "fd_low": round(max(0.0, low), 4), "fd_high": round(high, 4)}
    return row | {
        "fd_extractor": tools.extractor.title,
        "clip_score": None if score is None else round(score.value, 4),
        "clip_model": tools.clip.title if tools.clip else None,
        "attribute_accuracy": None if share is None else round(share.value, 5),
        "metrics": {name: _told(f) for name, f in found.items() if math.isfinite(f.value + f.error)},
    }


def _told(figure: Figure) -> dict[str, Any]:
    """Returns a figure as JSON: its interval, number of units, and what pooling and comparing it needs besides."""
    low, high = figure.interval()
    told = {"value": round(figure.value, 6), "low": round(low, 6), "high": round(high, 6)}
    told |= {"n": len(figure.influence), "of": figure.unit}
    told |= {"trials": figure.trials} if figure.trials is not None else {}
    return told | ({"bend": round(figure.bend, 6)} if figure.bend else {})
