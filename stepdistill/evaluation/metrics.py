"""One pass over the images feeds every metric: features for the distance, embeddings for CLIP score and attributes.

The metrics are in `measures/`, one file each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation import hashes
from stepdistill.evaluation.attributes import Probes, load_probes
from stepdistill.evaluation.clip import ClipModel, load_clip
from stepdistill.evaluation.features import Extractor, load_extractor
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.frame import Frame
from stepdistill.evaluation.frechet import Moments
from stepdistill.evaluation.measures import METRICS, NO_PICTURES, View
from stepdistill.evaluation.progress import say
from stepdistill.evaluation.protocols import OMITTED, Protocol, ScorerSpec, with_data
from stepdistill.evaluation.real import Progress, RealPictures
from stepdistill.evaluation.reference import load_reference
from stepdistill.evaluation.sets import EvalSet, open_set
from stepdistill.evaluation.statistics import are_statistics
from stepdistill.files import sha256


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


def prepare(
    protocol: Protocol, *, device: str = "cpu", batch: int = 64, progress: Progress = lambda done, total: None
) -> Instruments:
    """Loads the instruments that a protocol names; reports each metric that cannot be measured with them, and why.

    Raises:
        InputError: there are fewer prompts than images, too few images for a metric, or a set, extractor or scorer is
            not available.
    """
    protocol = with_data(protocol, None, None)
    prompts, reference = load_sets(protocol)
    settings = protocol.extractor
    extractor = load_extractor(settings.name, size=settings.size, resize=settings.resize, device=device)
    clip, probes, content = load_scorer(protocol.scorer, prompts, device)
    real = None
    if reference is not None:
        count = protocol.reference_n or reference.count
        few, key = min(protocol.n, count), content.get("scorer", "")
        real = RealPictures(reference, extractor, few, count, clip, key, batch, progress=progress)
    tools = Instruments(prompts, extractor, Moments.empty(extractor.dim), clip, probes, real=real, frame=protocol.frame)
    metrics, omitted = select_metrics(protocol, tools)
    needs = {need for name in metrics for need in METRICS[name].needs}
    if "embeddings" in needs and clip.frame is not None:
        real = dataclasses.replace(real, for_clip=open_set(protocol.reference, clip.frame))
    content |= {"prompts": prompts.key, "extractor": extractor.identity} | of_metrics(metrics, omitted, device)
    moments, of_reference = load_reference(protocol, extractor, real, known="features" in needs)
    for name, why in omitted.items():
        say(f"{name} is omitted: {why}")
    content = tuple(sorted((content | of_reference).items()))
    return dataclasses.replace(tools, reference=moments, metrics=metrics, content=content, real=real)


def load_sets(protocol: Protocol) -> tuple[EvalSet, EvalSet | None]:
    """Opens a protocol's prompts and its real images; the latter are None if their statistics are given instead.

    Raises:
        InputError: there is no such set, or it has fewer prompts or images than the protocol needs.
    """
    size = protocol.frame or protocol.size
    prompts = open_set(protocol.prompts, size)
    if prompts.prompts is not None and prompts.count < protocol.n:
        raise InputError(
            f"protocol {protocol.name}: got {prompts.count} prompts for n={protocol.n}; lower n or add prompts"
        )
    if are_statistics(protocol.reference):
        return prompts, None
    reference = prompts if protocol.reference == protocol.prompts else open_set(protocol.reference, size)
    if protocol.reference_n and protocol.reference_n > reference.count:
        raise InputError(
            f"protocol {protocol.name}: got reference_n={protocol.reference_n}; allowed: up to {reference.count}"
        )
    if reference.pictures is None:
        raise InputError(
            f"protocol {protocol.name}: got reference {protocol.reference}, which has no pictures; name a set that has"
        )
    return prompts, reference


def load_scorer(
    scorer: ScorerSpec | None, prompts: EvalSet, device: str
) -> tuple[ClipModel | None, Probes | None, dict[str, str]]:
    """Loads a protocol's CLIP and the attribute probes in its folder, and returns their hashes by name.

    There is no CLIP without a scorer or prompts, and there are no probes if the prompts' attributes are unknown.

    Raises:
        InputError: one of them is not available.
    """
    if scorer is None or prompts.prompts is None:
        return None, None, {}
    clip = load_clip(scorer.model, pretrained=scorer.pretrained, prefix=scorer.prefix, device=device)
    clip = dataclasses.replace(clip, scale=scorer.scale, frame=scorer.frame)
    content = {"scorer": hashes.of_module(clip.model)}
    if scorer.model != "avatars":  # whose setup ships with the package
        content["scorer setup"] = clip.setup
    if prompts.attributes is None or not clip.folder or not (clip.folder / "probes.json").is_file():
        return clip, None, content
    return clip, load_probes(clip.folder), content | {"probes": sha256(clip.folder / "probes.safetensors")}


def select_metrics(protocol: Protocol, tools: Instruments) -> tuple[tuple[str, ...], dict[str, str]]:
    """Returns the names of a protocol's metrics that the instruments can measure, and why each other one is omitted.

    Raises:
        InputError: there are too few images for a metric, generated or real.
    """
    chosen, omitted, extractor = [], {}, tools.extractor
    for name in protocol.metrics:
        metric = METRICS[name]
        if why := metric.lacks(tools):
            omitted[name] = why
        elif protocol.n < math.ceil(metric.per_feature * extractor.dim):
            each = f"{metric.per_feature:g} images for each of {extractor.title}'s {extractor.dim} features"
            omitted[name] = f"got n={protocol.n}; it needs {each}"
        elif protocol.n < metric.least:
            got = f"n={protocol.n} with the metric {name}"
            raise InputError(
                f"protocol {protocol.name}: got {got}; allowed: {metric.least} or more; raise n, or add images"
            )
        elif metric.needs and tools.real.count < metric.least:
            raise InputError(
                f"protocol {protocol.name}: got a reference of {tools.real.count} pictures with the metric {name}; "
                f"allowed: {metric.least} or more; add pictures"
            )
        else:
            chosen.append(name)
    return tuple(chosen), omitted


def of_metrics(chosen: Sequence[str], omitted: Mapping[str, str], device: str) -> dict[str, str]:
    """Loads what the chosen metrics need besides the instruments. Returns what of the metrics enters the protocol's
    hash: the hashes of what was loaded, revisions above 1, and those omitted because the real images are not given,
    which the settings and n do not determine.

    Raises:
        InputError: something is not available.
    """
    content: dict[str, str] = {}
    for name in chosen:
        revision = METRICS[name].revision
        content |= METRICS[name].prepare(device) | ({f"{name} revision": str(revision)} if revision > 1 else {})
    unseen = sorted(name for name, why in omitted.items() if why == NO_PICTURES)
    return content | ({OMITTED: " ".join(unseen)} if unseen else {})


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
        self.metrics = [metric for metric in listed if metric.each == each and not metric.lacks(instruments)]
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
    """Returns a row's metric columns: the main figures as columns, and all figures with intervals in `metrics`.

    Raises:
        InputError: a figure, or its error, is not finite.
    """
    for name, figure in found.items():
        if not math.isfinite(figure.value + figure.error):
            raise InputError(
                f"metric {name}: got {figure.value:g} ± {figure.error:g}; allowed: finite numbers; look at the "
                "pictures, or leave the metric out"
            )
    score, share = found.get("clip_score"), found.get("attribute_accuracy")
    row: dict[str, Any] = {"fd": None, "fd_low": None, "fd_high": None}
    if "fd" in found:
        low, high = found["fd"].interval()
        row = {"fd": round(found["fd"].value, 4), "fd_low": round(max(0.0, low), 4), "fd_high": round(high, 4)}
    return row | {
        "fd_extractor": tools.extractor.title,
        "fd_features": tools.extractor.dim,
        "clip_score": None if score is None else round(score.value, 4),
        "clip_model": tools.clip.title if tools.clip else None,
        "attribute_accuracy": None if share is None else round(share.value, 5),
        "metrics": {name: _as_json(f) for name, f in found.items()},
    }


def _as_json(figure: Figure) -> dict[str, Any]:
    """Returns a figure as JSON: its interval, number of units, and what pooling and comparing it needs besides."""
    low, high = figure.interval()
    fields = {"value": round(figure.value, 6), "low": round(low, 6), "high": round(high, 6)}
    fields |= {"n": len(figure.influence), "of": figure.unit}
    fields |= {"trials": figure.trials} if figure.trials is not None else {}
    fields |= {"bend": round(figure.bend, 6)} if figure.bend else {}
    return fields | ({"fit": [[float(f"{x:.7g}"), round(y, 6)] for x, y in figure.fit]} if figure.fit else {})
