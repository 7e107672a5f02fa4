"""Protocols: everything a figure depends on, in one small YAML file, with a hash that goes into every row.

    protocol = load_protocol("avatars-2k")        # benchmarks/protocols/avatars-2k.yaml, or a path to a file

Two rows can be compared if their hashes are equal. The hash covers the file's settings and the content they name:
prompts, reference images, extractor and scorer weights. It does not cover the description or the seed: seeds of one
protocol are meant to be compared. Protocols of published data leave the data to the user: `prompts: --prompts`,
`reference: --reference`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepdistill.data.avatars import SIZE as AVATARS
from stepdistill.errors import InputError
from stepdistill.evaluation import shipped
from stepdistill.evaluation.clip import LOCAL
from stepdistill.evaluation.frame import Frame
from stepdistill.evaluation.measures import METRICS
from stepdistill.evaluation.schedulers import SCHEDULERS, SPACINGS
from stepdistill.evaluation.statistics import are_statistics
from stepdistill.typed import built, read_yaml

DATA = "--data"  # as a protocol's prompts and reference: the user gives one folder for both
PROMPTS, REFERENCE = "--prompts", "--reference"  # the same, given separately
OMITTED = "omitted"  # in the content that is hashed: metrics not measured because the real images are not given


@dataclass(frozen=True)
class ExtractorSpec:
    """Which features: a name in `features.EXTRACTORS`, its input size in pixels, and the resize to that size."""

    name: str
    size: int | None = None
    resize: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise InputError(f"extractor size: got {self.size}; allowed: 1 or more pixels; raise it")


@dataclass(frozen=True)
class ScorerSpec:
    """Which CLIP: a name for `clip.load_clip`, its weights' tag, and a prefix for each prompt.

    Attributes:
        scale: of the cosine: 100, or 1 if a paper does not scale. frame: how images are preprocessed for it, instead of
            by the protocol's frame.
    """

    model: str
    pretrained: str | None = None
    prefix: str = ""
    scale: float = 100.0
    frame: Frame | None = None

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InputError(
                f"scorer scale: got {self.scale}; allowed: above 0; take 100, or 1 where a paper has the plain cosine"
            )

    def placeless(self) -> dict[str, str | None]:
        """Returns model and weights without their location."""
        own = self.pretrained is not None and Path(self.pretrained).is_file()
        return {"model": self.model.partition(":")[0] if self.model.startswith(LOCAL) else self.model,
                "pretrained": "a file" if own else self.pretrained}  # fmt: skip


@dataclass(frozen=True)
class SamplerSpec:
    """How models are sampled whose SPEC does not say: a scheduler and a spacing, as in a SPEC."""

    scheduler: str
    spacing: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("scheduler", self.scheduler, SCHEDULERS), ("spacing", self.spacing, SPACINGS)):
            if value is not None and value not in allowed:
                raise InputError(f"sampler {name}: got {value!r}; allowed: {', '.join(allowed)}; name one of them")


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is run.

    Attributes:
        name, version: of the protocol. description, where: for readers, what it is and where its data are; not hashed.
        n: images per cell. prompts: the set they are generated for (see `sets.open_set`).
        reference: the set they are compared with, or its statistics. reference_n: number of its images; None means all.
            A folder that the user names must hold exactly this number.
        size: side in pixels that a folder's images are resized to; None keeps their size. The images of a folder given
            as `--reference` must already have it.
        frame: how every image, real or generated, is preprocessed before any metric.
        extractor: of the Frechet distance. scorer: of the CLIP score; None for a set without prompts.
        metrics: names in `measures.METRICS`; those that need what is not given (captions, probes, the real images)
            are omitted, which is reported.
        guidance, sampler: defaults for models whose SPEC has none. negative_prompt: for models whose guidance takes a
            second call. steps: step counts, if neither the user nor the model names any. seed: of the images' noise.
    """

    name: str
    n: int
    prompts: str
    reference: str
    extractor: ExtractorSpec
    scorer: ScorerSpec | None = None
    version: int = 1
    reference_n: int | None = None
    metrics: tuple[str, ...] = ("fd", "clip", "attributes")
    guidance: float | None = None
    size: int | None = None
    frame: Frame | None = None
    sampler: SamplerSpec | None = None
    negative_prompt: str | None = None
    steps: tuple[int, ...] = ()
    seed: int = 0
    description: str = field(default="", compare=False)
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", tuple(self.metrics))
        object.__setattr__(self, "steps", tuple(self.steps))
        for name, least in (("n", 2), ("version", 1), ("reference_n", 2), ("size", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise InputError(f"protocol {self.name}: got {name}={value}; allowed: {least} or more; raise it")
        if self.guidance is not None and not 1 <= self.guidance < math.inf:
            raise InputError(f"protocol {self.name}: got guidance={self.guidance}; allowed: 1.0 (none) or more")
        for name in ("name", "prompts", "reference"):
            if not getattr(self, name):
                raise InputError(f"protocol {self.name}: got an empty {name}; allowed: text; write it")
        if unknown := set(self.metrics) - set(METRICS):
            raise InputError(f"protocol {self.name}: got the metric {min(unknown)!r}; allowed: {', '.join(METRICS)}")
        if low := [count for count in self.steps if count < 1]:
            raise InputError(f"protocol {self.name}: got {low[0]} steps; allowed: 1 or more each; raise it")
        for name, listed in (("metrics", self.metrics), ("steps", self.steps)):
            if len(set(listed)) < len(listed):
                raise InputError(f"protocol {self.name}: got {name} with one twice; allowed: each once; take it out")
        if not self.metrics:
            raise InputError(f"protocol {self.name}: got no metrics; allowed: {', '.join(METRICS)}; list some")

    @property
    def side(self) -> int | None:
        """Side in pixels that models' images must have; None if a frame resizes all images, or if any size is
        allowed."""
        return None if self.frame else AVATARS if self.reference.split(":")[0] == "avatars" else self.size

    def check_side(self, model: str, side: int | None) -> None:
        """Checks that a model's images have the size of those they are compared with.

        Raises:
            InputError: they do not.
        """
        if None not in (side, self.side) and side != self.side:
            raise InputError(
                f"--model {model}: got a model of {side} pixels, and {self.name} has {self.side}; allowed: as many; "
                "give your own pictures with --data FOLDER, or another --protocol"
            )

    def hash(self, content: Mapping[str, str]) -> str:
        """Returns 16 hex digits of the settings and of the content they name, whatever its location.

        Args:
            content: hashes of the prompts, the reference and the networks, by name.
        """
        text = json.dumps([self.settings(), dict(content)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Any]:
        """Returns the fields that the hash covers, as JSON types. The contents of prompts, reference and a user's own
        scorer are hashed separately, as content."""
        settings = dataclasses.asdict(self) | {"metrics": list(self.metrics), "steps": list(self.steps)}
        for name in ("description", "where", "seed", "prompts", "reference"):
            del settings[name]
        if self.scorer is not None:
            settings["scorer"] |= self.scorer.placeless()
        return settings


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flattens nested settings into one mapping, with names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def names() -> list[str]:
    """Returns the names of the protocols that ship."""
    return shipped.names("protocols")


def load_protocol(name: str | Path) -> Protocol:
    """Loads a protocol by name, or from a .yaml file.

    Raises:
        InputError: no such protocol, or a file with fields that are unknown, missing, repeated or of the wrong type.
    """
    from stepdistill.evaluation.features import EXTRACTORS
    from stepdistill.evaluation.resize import RESIZES

    file = shipped.find("protocols", name)
    if not file.is_file():
        raise InputError(f"protocol: got {name}; allowed: {', '.join(names())}, or a path to a .yaml file")
    protocol = built(Protocol, read_yaml(file, "protocol"), str(file))
    for what, got, allowed in (
        ("extractor", protocol.extractor.name, EXTRACTORS), ("resize", protocol.extractor.resize, RESIZES),
    ):  # fmt: skip
        if got is not None and got not in allowed:
            raise InputError(f"{file}: got the {what} {got!r}; allowed: {', '.join(allowed)}; name one of them")
    return protocol


def on_folder(protocol: Protocol, folder: str | Path, size: int | None) -> tuple[Protocol, bool]:
    """Applies a protocol that leaves its images to the user, such as `imagefolder`, to a folder of images.

    Args:
        size: side in pixels they are resized to; None keeps their size.

    Returns:
        The protocol, with n at most the number of images, and whether they have captions.

    Raises:
        InputError: the protocol names its own images, or the folder holds fewer than two.
    """
    from stepdistill.evaluation.sets import listing

    if protocol.prompts != DATA:
        raise InputError(
            f"--data: got {folder} with the protocol {protocol.name}, which has pictures of its own; allowed: one of "
            "the two; leave --protocol out"
        )
    files, captions = listing(folder)
    if len(files) < 2:
        raise InputError(f"--data: got {folder}, which holds 1 picture; allowed: 2 or more; add some")
    place = str(Path(folder).expanduser())
    changes = {"prompts": place, "reference": place, "size": size, "n": min(protocol.n, len(files))}
    return dataclasses.replace(protocol, **changes), captions is not None


def with_data(protocol: Protocol, prompts: str | Path | None, reference: str | Path | None) -> Protocol:
    """Applies a protocol of published data to the user's copy of the data.

    Args:
        prompts: a text file, one prompt per line. reference: a folder of images, or their statistics (.npz,
            .safetensors).

    Raises:
        InputError: one is missing (the message says where to get it), or the protocol names its own; or the folder
            does not hold the number of images that the protocol compares with, or not at its size.
    """
    from stepdistill.evaluation.sets import check_copy

    places = {}
    for flag, name, given in ((PROMPTS, "prompts", prompts), (REFERENCE, "reference", reference)):
        asked = getattr(protocol, name) == flag
        if given is not None and not asked:
            raise InputError(
                f"{flag}: got {given} with the protocol {protocol.name}, which names its own {name}; leave it out"
            )
        if asked and given is None:
            where = " ".join(protocol.where.split())
            raise InputError(f"protocol {protocol.name}: got no {flag}; give the path of yours; {where}")
        if asked:
            places[name] = str(Path(given).expanduser())
    if "reference" in places and not are_statistics(places["reference"]):
        check_copy(places["reference"], protocol.reference_n, protocol.size)
    return dataclasses.replace(protocol, **places)
