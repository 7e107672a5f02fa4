"""Checks that a pipeline is complete: all components that its index names, and the vocabularies of its tokenizers.

The libraries do not always fail on a missing file: a CLIP tokenizer without its vocabulary has two tokens, and every
prompt then looks the same to the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from stepdistill.errors import InputError

# the files in a component's folder, by a word in its class name; each entry lists alternative sets
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))
FILES = {
    "Tokenizer": tuple(("tokenizer_config.json", *files) for files in VOCABULARIES),
    "Scheduler": (("scheduler_config.json",),),
    "Processor": (("preprocessor_config.json",), ("processor_config.json",)),
    "FeatureExtractor": (("preprocessor_config.json",),),
    "": (("config.json",),),
}
LEAST = 0.5  # least share of an encoder's vocabulary that its tokenizer has: encoders are padded by a few per cent


def check_folder(folder: Path, without: Iterable[str] = ()) -> None:
    """Checks that a pipeline's folder holds what its model_index.json names.

    Args:
        without: components that will not be loaded.

    Raises:
        InputError: a component is missing; the message names the first.
        OSError, ValueError: the index cannot be read.
    """
    for name, kind in _named(json.loads((folder / "model_index.json").read_text())):
        if name in without:
            continue
        choices = next(files for word, files in FILES.items() if word in kind)
        here = {file.name for file in (folder / name).glob("*")}
        if not any(here.issuperset(files) for files in choices):
            lacks = [[file for file in files if file not in here] for files in choices]
            missing = " and ".join(min(lacks, key=len)) if here else "the folder"
            raise InputError(
                f"pipeline: got {folder}, whose {name} ({kind}) lacks {missing}; allowed: all that model_index.json "
                "names; copy or fetch it again"
            )


def _named(index: dict) -> Iterator[tuple[str, str]]:
    """Yields the components of an index and their classes, except those that it marks as absent."""
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value):
            yield name, value[1]


def check_words(pipeline, path: str) -> None:
    """Checks that each tokenizer of a loaded pipeline matches its text encoder.

    Raises:
        InputError: its vocabulary is smaller than half of the encoder's, or larger than the encoder's.
    """
    for name, tokenizer in pipeline.components.items():
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        if not name.startswith("tokenizer") or tokenizer is None or not hasattr(encoder, "get_input_embeddings"):
            continue
        words, known = encoder.get_input_embeddings().num_embeddings, len(tokenizer)
        if not LEAST * words <= known <= words:
            raise InputError(
                f"pipeline: got {path}, whose {name} knows {known} words of the {words} of its text encoder; allowed: "
                "the tokenizer it was trained with; copy or fetch it again"
            )
