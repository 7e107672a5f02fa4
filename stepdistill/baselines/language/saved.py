"""Folders of trained models as transformers loads them, with their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill.baselines.language.labelled import Classifier
from stepdistill.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD = "head.safetensors"


def save(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, head: nn.Linear | None = None
) -> None:
    """Saves a model; a classifier's head, which is no part of it, goes to a file of its own."""
    with replacing(target) as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if head is not None:
            save_file(head.state_dict(), folder / HEAD)


def save_classifier(
    network: Classifier, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str], target: Path
) -> None:
    """Saves an encoder, with the classes in its configuration, and its head beside it."""
    network.body.config.id2label = dict(enumerate(classes))
    network.body.config.label2id = {name: i for i, name in enumerate(classes)}
    save(network.body, tokenizer, target, head=network.head)


def load_classifier(folder: Path | str) -> Classifier:
    """Loads what save_classifier saved, in evaluation mode."""
    from transformers import AutoModel

    body = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    network = Classifier(body, body.config.num_labels)
    network.head.load_state_dict(load_file(Path(folder) / HEAD))
    return network.eval()
