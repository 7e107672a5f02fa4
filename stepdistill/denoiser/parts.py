"""Whether a pipeline is whole: its folder holds each part that its index names, and its tokenizers know their words.

A part that is missing does not always stop the libraries: a CLIP tokenizer without its vocabulary has two tokens, and
to a network trained with it every prompt is the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from stepdistill.errors import InputError

# what a part of a class whose name holds the word has in its folder; each a choice of sets of files
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))
FILES = {
    "Tokenizer": tuple(("tokenizer_config.json", *files) for files in VOCABULARIES),
    "Scheduler": (("scheduler_config.json",),),
    "Processor": (("preprocessor_config.json",), ("processor_config.json",)),
    "FeatureExtractor": (("preprocessor_config.json",),),
    "": (("config.json",),),
}
LEAST = 0.5  # of an encoder's words that its tokenizer knows: encoders are padded to round numbers, by few per cent


def check_folder(folder: Path, without: Iterable[str] = ()) -> None:
    """Checks that a pipeline's folder holds what its model_index.json names.

    Args:
        without: parts that will not be loaded.

    Raises:
        InputError: the first that is missing.
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
    """The parts of an index and their classes, but for those it says there are none of."""
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value):
            yield name, value[1]


def check_words(pipeline, path: str) -> None:
    """Checks that each tokenizer of a loaded pipeline fits the text encoder it goes before.

    Raises:
        InputError: it knows less than half of the encoder's words, or more than all.
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
