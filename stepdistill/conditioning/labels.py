"""Class labels in place of text, for class-conditional pixel models; or no condition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepdistill.conditioning.base import Cond
from stepdistill.errors import InputError


class LabelConditioner:
    """Prompts are class numbers, "0" to "classes - 1"; a model without classes has an empty condition.

    Args:
        classes: number of classes; 0 for an unconditional model.
        null_label: the label that means no class, if the model was trained with one.
    """

    def __init__(self, classes: int, null_label: int | None = None) -> None:
        self.classes = classes
        self.null_label = null_label

    @classmethod
    def of(cls, pipeline) -> LabelConditioner:
        """Builds the conditioner of a pixel pipeline: all classes that its network embeds, without a null label."""
        return cls(pipeline.unet.config.num_class_embeds or 0)

    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Cond:
        """labels (B,) int64, or an empty condition if the model has no classes."""
        if not self.classes:
            return {}
        for prompt in prompts:
            if not prompt.strip().isdecimal() or int(prompt) >= self.classes:
                raise InputError(f"class label: got {prompt!r}; allowed: numbers 0 to {self.classes - 1}; see its card")
        return {"labels": torch.tensor([int(p) for p in prompts])}

    def unconditional(self, n: int = 1, *, size: tuple[int, int] | None = None) -> Cond:
        """The null label n times.

        Raises:
            InputError: the model has classes and no null label, so it cannot be guided.
        """
        if not self.classes:
            return {}
        if self.null_label is None:
            raise InputError("guidance: got a model of classes without a null label; allowed: 1.0; leave guidance out")
        return {"labels": torch.full((n,), self.null_label)}
