"""What a metric is: it looks at pictures batch by batch, and gives figures in the end."""

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


@dataclass(frozen=True)
class View:
    """A batch of pictures and what the instruments see in them, each looked at once whatever number of metrics ask.

    Attributes:
        pictures: (B, 3, H, W) uint8, number `first` and on of the set; in the protocol's frame, where it has one.
        drawn: the same as they came.
    """

    tools: Instruments
    first: int
    pictures: Tensor
    drawn: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "drawn", self.pictures)
        if self.tools.frame is not None:
            object.__setattr__(self, "pictures", self.tools.frame.batch(self.pictures))

    @property
    def prompts(self) -> Sequence[str]:
        """B, what the pictures were drawn for."""
        return self.tools.prompts.prompts[self.first : self.first + len(self.pictures)]

    @cached_property
    def features(self) -> Tensor:
        """(B, D) float32 of the extractor, on the CPU."""
        return self.tools.extractor(self.pictures).cpu()

    @cached_property
    def embedding(self) -> Tensor:
        """(B, E) float32, unit length: CLIP's of the pictures."""
        clip = self.tools.clip
        return clip.images(self.pictures if clip.frame is None else self.drawn)

    @cached_property
    def text(self) -> Tensor:
        """(B, E) float32, unit length: CLIP's of their prompts."""
        known = self.tools.texts  # prompts are the same in every cell
        key = self.first, len(self.pictures)
        if key not in known:
            known[key] = self.tools.clip.texts(self.prompts)
        return known[key]


class Metric(ABC):
    """One metric of one cell. A metric more is a file here, and a test.

    Attributes:
        name: as protocols list it. keeps: the name of what it keeps of each picture; metrics of the same share it.
        better: "lower" or "higher", by figure.
        revision: of what its figures mean; one above 1 goes into the protocol's hash.
        least: pictures it needs. per_feature: pictures it needs for each of the extractor's features; with fewer its
            figures are left out. needs: what it asks of the real pictures: attributes of `real.RealPictures`.
        each: pictures of a prompt, 1 of the pass over the protocol's own; a metric of more has pictures drawn for
            itself, each with a seed of its own, for the first `prompts` prompts, and sees those of one prompt in a row.
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
        """Loads what it needs besides the instruments; gives the hashes of it by name, for the protocol's own.

        Raises:
            InputError: that cannot be had.
        """
        return {}

    @classmethod
    def fits(cls, tools: Instruments) -> bool:
        """Whether the instruments have what it needs; where not, its figures are left out."""
        return tools.real is not None or not cls.needs

    @staticmethod
    @abstractmethod
    def see(view: View) -> Tensor:
        """What is kept of a batch, (B, ...). It depends on each picture alone, so that processes can share the work."""

    @staticmethod
    @abstractmethod
    def figures(kept: Tensor, tools: Instruments) -> dict[str, Figure]:
        """Figures by name, from what was kept of all pictures, (N, ...) in order."""
