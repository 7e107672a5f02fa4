"""Attribute accuracy: whether an image shows what its prompt names, judged by linear probes on the scorer's embedding.

A prompt that names red clothes and no hat poses two questions; the accuracy is the share of correct answers over the
questions of all prompts. Attributes that a prompt does not mention are not judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.errors import InputError


@dataclass(frozen=True)
class Probes:
    """One linear classifier per attribute.

    Attributes:
        classes: attribute -> its classes, in the order of the logits.
        weights: attribute -> (classes, D). biases: attribute -> (classes,).
    """

    classes: Mapping[str, Sequence[str]]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]

    def read(self, embedding: Tensor) -> dict[str, list[str]]:
        """Predicts each image's class of every attribute: unit-length embeddings (B, D) -> attribute -> B classes."""
        embedding = embedding.float().cpu()
        found = {}
        for name, classes in self.classes.items():
            best = (embedding @ self.weights[name].T + self.biases[name]).argmax(-1)
            found[name] = [classes[i] for i in best.tolist()]
        return found

    def judge(
        self, embedding: Tensor, attributes: Sequence[Mapping[str, str]], mentioned: Sequence[Sequence[str]]
    ) -> Tensor:
        """Returns (B, attributes) int8: 1 if correct, 0 if wrong, -1 if the prompt does not mention the attribute.

        Args:
            embedding: (B, D), unit length. attributes: each image's true classes. mentioned: what each prompt names.

        Raises:
            InputError: a prompt names an attribute that has no probe.
        """
        found = self.read(embedding)
        judged = torch.full((len(mentioned), len(self.classes)), -1, dtype=torch.int8)
        column = {name: i for i, name in enumerate(self.classes)}
        for i, names in enumerate(mentioned):
            for name in names:
                if name not in column:
                    raise InputError(f"attribute: got {name!r}; allowed: {', '.join(self.classes)}, which have probes")
                judged[i, column[name]] = found[name][i] == attributes[i][name]
        return judged


def load_probes(folder: str | Path) -> Probes:
    """Loads the probes in a scorer's folder: the classes from probes.json, the weights from probes.safetensors.

    Raises:
        InputError: a file is missing or broken, or the two do not match.
    """
    folder = Path(folder)
    try:
        classes = json.loads((folder / "probes.json").read_text())
        tensors = load_file(folder / "probes.safetensors")
        weights = {name: tensors[f"{name}.weight"].float() for name in classes}
        biases = {name: tensors[f"{name}.bias"].float() for name in classes}
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"probes: got {folder}, where {error} is missing or broken; retrain the scorer") from error
    for name, values in classes.items():
        if len(weights[name]) != len(values):
            raise InputError(
                f"probes: got {len(weights[name])} rows for {len(values)} classes of {name!r}; retrain the scorer"
            )
    return Probes(classes, weights, biases)
