"""The interface of metrics: a metric sees images batch by batch and computes figures at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from stepdistill.evaluation.figures import Figure

if TYPE_CHECKING:
    from stepdistill.evaluation.metrics import Instruments

NO_PICTURES = "got statistics as the reference; it needs the real images"
NO_PROMPTS = "got a set without prompts; it needs them"
NO_SCORER = "got a protocol without a scorer; it needs one"


def no_scorer(tools: Instruments) -> str | None:
    """Returns why there is no CLIP to measure with; None if there is one."""
    if tools.clip is not None:
        return None
    return NO_PROMPTS if tools.prompts.prompts is None else NO_SCORER


@dataclass(frozen=True)
class View:
    """A batch of images with their features and embeddings, each computed once however many metrics use it.

    Attributes:
        pictures: (B, 3, H, W) uint8, from number `first` of the set on; in the protocol's frame, if it has one.
        each: consecutive images per prompt.
        drawn: the same images without the frame.
    """

    tools: Instruments
    first: int
    pictures: Tensor
    each: int = 1
    drawn: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "drawn", self.pictures)
        if self.tools.frame is not None:
            object.__setattr__(self, "pictures", self.tools.frame.batch(self.pictures))

    @property
    def prompts(self) -> Sequence[str]:
        """The B prompts of the images."""
        numbers = range(self.first, self.first + len(self.pictures))
        return [self.tools.prompts.prompts[number // self.each] for number in numbers]

    @cached_property
    def features(self) -> Tensor:
        """The extractor's features, (B, D) float32, on the CPU."""
        return self.tools.extractor(self.pictures).cpu()

    @cached_property
    def embedding(self) -> Tensor:
        """CLIP's embeddings of the images, (B, E) float32, unit length."""
        clip = self.tools.clip
        return clip.images(self.pictures if clip.frame is None else self.drawn)

    @cached_property
    def text(self) -> Tensor:
        """CLIP's embeddings of the prompts, (B, E) float32, unit length."""
        known = self.tools.texts  # prompts are the same in every cell
        key = self.first, len(self.pictures), self.each
        if key not in known:
            known[key] = self.tools.clip.texts(self.prompts)
        return known[key]


class Metric(ABC):
    """One metric of one cell. To add a metric, add a file here and a test.

    Attributes:
        name: as protocols list it. keeps: the name of what it keeps of each image, shared by metrics with the same.
        better: "lower" or "higher", by figure; without figures of which neither is.
        revision: of its figures' definition; above 1 it goes into the protocol's hash.
        least: minimum number of images. per_feature: minimum number of images per feature of the extractor; below it
            the figures are omitted. needs: what it needs of the real images: attributes of `real.RealPictures`.
        each: images per prompt, 1 for the pass over the protocol's own images. A metric with more has images generated
            for the first `prompts` prompts, each with its own seed, and sees those of a prompt consecutively.
    """

    name: ClassVar[str]
    keeps: ClassVar[str]
    better: ClassVar[Mapping[str, str]]
    revision: ClassVar[int] = 1
    least: ClassVar[int] = 2
    per_feature: ClassVar[float] = 0.0
    needs: ClassVar[tuple[str, ...]] = ()
    each: ClassVar[int] = 1
    prompts: ClassVar[int | None] = None

    @classmethod
    def prepare(cls, device: torch.device | str) -> dict[str, str]:
        """Loads what it needs besides the instruments; returns its hashes by name, for the protocol's hash.

        Raises:
            InputError: something is not available.
        """
        return {}

    @classmethod
    def lacks(cls, tools: Instruments) -> str | None:
        """Returns why its figures cannot be computed with these instruments, so that they are omitted; None if they
        can."""
        if cls.needs and tools.real is None:
            return NO_PICTURES
        return NO_PROMPTS if cls.each > 1 and tools.prompts.prompts is None else None

    @staticmethod
    @abstractmethod
    def see(view: View) -> Tensor:
        """Returns what is kept of a batch, (B, ...), computed image by image so that processes can share the work."""

    @staticmethod
    @abstractmethod
    def figures(kept: Tensor, tools: Instruments) -> dict[str, Figure]:
        """Computes figures by name from what was kept of all images, (N, ...) in order."""
