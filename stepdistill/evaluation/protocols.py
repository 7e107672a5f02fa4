"""Protocols: everything that fixes a number, in one small YAML file, with a hash that goes into every row.

    protocol = load_protocol("avatars-2k")        # benchmarks/protocols/avatars-2k.yaml, or a path to a file

Two rows can be compared when their hashes are equal. The hash covers the file's settings and the content they name:
prompts, reference pictures, extractor and scorer weights. It does not cover the description, nor the seed: seeds of one
protocol are there to be compared. Protocols of published data leave it to the user to have them: `prompts: --prompts`,
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

DATA = "--data"  # in a protocol's file, as its prompts and reference: the folder is the user's to name
PROMPTS, REFERENCE = "--prompts", "--reference"  # the same, each by itself


@dataclass(frozen=True)
class ExtractorSpec:
    """Which features: a name of `features.EXTRACTORS`, pixels to work at, and how pictures get there."""

    name: str
    size: int | None = None
    resize: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise InputError(f"extractor size: got {self.size}; allowed: 1 or more pixels; raise it")


@dataclass(frozen=True)
class ScorerSpec:
    """Which CLIP: a name of `clip.load_clip`, its weights' tag, and what goes before each prompt.

    Attributes:
        scale: of the cosine: 100, or 1 where a paper does not scale. frame: how pictures are brought before it, in
            place of the protocol's way.
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
        """Model and weights without the places where they lie."""
        own = self.pretrained is not None and Path(self.pretrained).is_file()
        return {"model": self.model.partition(":")[0] if self.model.startswith(LOCAL) else self.model,
                "pretrained": "a file" if own else self.pretrained}  # fmt: skip


@dataclass(frozen=True)
class SamplerSpec:
    """How models are sampled that say nothing of it: a scheduler and a spacing, as in a SPEC."""

    scheduler: str
    spacing: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("scheduler", self.scheduler, SCHEDULERS), ("spacing", self.spacing, SPACINGS)):
            if value is not None and value not in allowed:
                raise InputError(f"sampler {name}: got {value!r}; allowed: {', '.join(allowed)}; name one of them")


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is made.

    Attributes:
        name, version: of the protocol. description, where: for people, what it is and where its data are; not hashed.
        n: pictures in a cell. prompts: the set they are drawn for (see `sets.open_set`).
        reference: the set they are compared with, or its statistics. reference_n: how many of it; all where None. A
            folder that the user names has to hold as many.
        size: side in pixels that a folder's pictures are brought to; as they are where None. Those of a reference that
            the user names by itself have to have it.
        frame: how every picture, real or drawn, is brought before all that looks at it.
        extractor: of the Frechet distance. scorer: of the CLIP score; None for a set without prompts.
        metrics: names of `measures.METRICS`; those that need what a set lacks (captions, probes) are left out.
        guidance, sampler: of models that say nothing of their own. negative_prompt: of models that are guided by two
            calls. steps: step counts, where neither the user nor the model says any. seed: of the pictures' own noise.
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
        """Of pictures in pixels, which those of models must have; None where a frame brings all to one, or any will
        do."""
        return None if self.frame else AVATARS if self.reference.split(":")[0] == "avatars" else self.size

    def check_side(self, model: str, side: int | None) -> None:
        """Looks whether a model's pictures are as large as those they are to be compared with.

        Raises:
            InputError: they are not.
        """
        if None not in (side, self.side) and side != self.side:
            raise InputError(
                f"--model {model}: got a model of {side} pixels, and {self.name} has {self.side}; allowed: as many; "
                "give your own pictures with --data FOLDER, or another --protocol"
            )

    def hash(self, content: Mapping[str, str]) -> str:
        """16 hex digits of the settings and of what they name, wherever it lies.

        Args:
            content: hashes of the prompts, the reference and the networks, by name.
        """
        text = json.dumps([self.settings(), dict(content)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Any]:
        """The fields that the hash covers, as JSON has them. What prompts, reference and a user's own scorer hold is
        hashed as content, wherever they lie."""
        settings = dataclasses.asdict(self) | {"metrics": list(self.metrics), "steps": list(self.steps)}
        for name in ("description", "where", "seed", "prompts", "reference"):
            del settings[name]
        if self.scorer is not None:
            settings["scorer"] |= self.scorer.placeless()
        return settings


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings in one mapping, their names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def names() -> list[str]:
    """The protocols that ship."""
    return shipped.names("protocols")


def load_protocol(name: str | Path) -> Protocol:
    """A protocol by name, or from a .yaml file.

    Raises:
        InputError: no such protocol, or a file with fields that are unknown, missing, twice there or of another kind.
    """
    from stepdistill.evaluation.features import EXTRACTORS
    from stepdistill.evaluation.resize import RESIZES

    file = shipped.found("protocols", name)
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
    """A protocol that leaves its pictures to the user, as `imagefolder` does, on a folder of them.

    Args:
        size: side in pixels they are brought to; as they are where None.

    Returns:
        The protocol, of as many pictures as there are at most, and whether they have captions.

    Raises:
        InputError: the protocol has pictures of its own, or the folder holds less than two.
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
    """A protocol of published data, on the user's copy of them.

    Args:
        prompts: a text file, a prompt a line. reference: a folder of pictures, or their statistics (.npz,
            .safetensors).

    Raises:
        InputError: one is missing, with where it can be had, or is not the user's to name; or the folder holds another
            number of pictures than the protocol compares with, or of another size.
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
