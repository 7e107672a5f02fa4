"""The attributes of the embedded set as labels, and linear classifiers of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepdistill.data import avatars


def attribute_classes() -> dict[str, list[str]]:
    """Every attribute of the embedded set with its classes, sorted."""
    rows = avatars.load("train").attributes
    return {name: sorted({row[name] for row in rows}) for name in sorted(rows[0])}


def attribute_labels(split: str, *, mentioned_only: bool) -> Tensor:
    """(N, attributes) class indices; with `mentioned_only`, the class after the last if the caption omits it."""
    data, classes = avatars.load(split), attribute_classes()
    index = {name: {value: i for i, value in enumerate(values)} for name, values in classes.items()}
    return torch.tensor([
        [
            index[name][row[name]] if not mentioned_only or name in named else len(classes[name])
            for name in classes
        ]
        for row, named in zip(data.attributes, data.mentioned, strict=True)
    ])  # fmt: skip


class Heads(nn.Module):
    """One linear classifier for each attribute."""

    def __init__(self, width: int, counts: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in counts)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over attributes: features (B, D), labels (B, attributes)."""
        losses = [
            nn.functional.cross_entropy(h(features).float(), y) for h, y in zip(self.heads, labels.T, strict=True)
        ]
        return torch.stack(losses).mean()

    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """(attributes,) share of correct classes."""
        right = [(h(features).argmax(-1) == y).float().mean() for h, y in zip(self.heads, labels.T, strict=True)]
        return torch.stack(right)
