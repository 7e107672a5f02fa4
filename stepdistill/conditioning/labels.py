"""Class labels in the place of text, for class-conditional pixel models; or no condition at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepdistill.conditioning.base import Cond
from stepdistill.errors import InputError


class LabelConditioner:
    """Prompts are class numbers, "0" to "classes - 1"; a model without classes has an empty condition.

    Args:
        classes: how many there are; 0 for an unconditional model. Where the embedding has one entry more than there
            are classes, that entry is the unconditional one.
    """

    def __init__(self, classes: int, null_label: int | None = None) -> None:
        self.classes = classes
        self.null_label = null_label

    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Cond:
        """labels (B,) int64, or an empty condition where the model has no classes."""
        if not self.classes:
            return {}
        for prompt in prompts:
            if not prompt.strip().isdigit() or int(prompt) >= self.classes:
                raise InputError(f"class label: got {prompt!r}; allowed: 0 to {self.classes - 1}")
        return {"labels": torch.tensor([int(p) for p in prompts])}

    def unconditional(self, n: int = 1, *, size: tuple[int, int] | None = None) -> Cond:
        """The null label n times.

        Raises:
            InputError: the model has classes and no null label, so it cannot be guided.
        """
        if not self.classes:
            return {}
        if self.null_label is None:
            raise InputError("guidance: got a class-conditional model without a null label; allowed: guidance 1.0")
        return {"labels": torch.full((n,), self.null_label)}
