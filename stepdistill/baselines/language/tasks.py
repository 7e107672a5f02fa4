"""Tasks of classifying texts.

avatars              captions of the embedded set; the class is the value of --label, "unsaid" if not mentioned
FILE.tsv             a class, a tab and a text per line; a tenth is held out unless --task-test names a file
owner/name:config    a `datasets` name, with columns "label" and "text" or "sentence", splits train and validation
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stepdistill.baselines.base import check_unused
from stepdistill.baselines.language.labelled import Labelled
from stepdistill.baselines.language.masked import surround
from stepdistill.baselines.language.texts import held_apart, read_file, read_table
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = "avatars, a .tsv file, or a datasets name (owner/name:config)"
UNMENTIONED = "unsaid"


def open_task(
    spec: str, tokenizer: PreTrainedTokenizerBase, length: int, *, label: str, limit: int | None, held_out: int,
    test: str | None = None, seed: int = 0,
) -> tuple[Labelled, Labelled]:  # fmt: skip
    """Opens the training and held-out texts of a task.

    Args:
        spec: see above. length: tokens of a text; longer ones are cut. label: an attribute of the embedded set.
        limit, held_out: texts of each at most. test: for a file, the held-out file.
        seed: of the draw if not all are taken, as a file's lines may be sorted by class.

    Raises:
        InputError: there is no such task, the training texts have one class, or held-out texts have others.
    """
    if Path(spec).suffix != ".tsv":
        check_unused("--task-test", test, f"--task {spec}")
    if spec == "avatars":
        train, held = (_captions(split, label) for split in ("train", "test"))
    elif Path(spec).suffix == ".tsv":
        train = _file(Path(spec).expanduser())
        train, held = (train, _file(Path(test).expanduser())) if test else held_apart(_shuffled(train, seed))
    else:
        train, held = (_dataset(spec, split) for split in ("train", "validation"))
    if not held:
        raise InputError(f"--task: got {len(train)} texts in {spec}, none to hold out; allowed: more, or --task-test")
    classes = sorted({name for name, _ in train})
    if strange := sorted({name for name, _ in held} - set(classes)):
        raise InputError(f"--task: got {strange[0]!r} in held-out texts of {spec}; allowed: classes of training texts")
    train, held = _shuffled(train, seed)[:limit], _shuffled(held, seed)[:held_out]
    if (kinds := len({name for name, _ in train})) < 2:
        raise InputError(f"--task: got {len(train)} texts of {kinds} class in {spec}; allowed: two or more")
    return tuple(_tokens(rows, classes, tokenizer, length) for rows in (train, held))


def _shuffled(rows: Sequence[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    return random.Random(seed).sample(rows, len(rows))


def _tokens(
    rows: Sequence[tuple[str, str]], classes: list[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> Labelled:
    pieces = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: length - 2] for _, text in rows]
    places = {name: i for i, name in enumerate(classes)}
    return Labelled(surround(pieces, tokenizer, length), torch.tensor([places[name] for name, _ in rows]), classes)


def _captions(split: str, label: str) -> list[tuple[str, str]]:
    from stepdistill.data import avatars

    data = avatars.load(split)
    if label not in data.attributes[0]:
        raise InputError(f"--label: got {label!r}; allowed: {', '.join(data.attributes[0])}")
    rows = zip(data.captions, data.attributes, data.mentioned, strict=True)
    return [(attributes[label] if label in mentioned else UNMENTIONED, text) for text, attributes, mentioned in rows]


def _file(path: Path) -> list[tuple[str, str]]:
    def parse(text: str) -> list[tuple[str, str]]:
        lines = [line.split("\t", 1) for line in text.split("\n") if line.strip()]
        return [(label, sentence) for label, sentence in lines]

    return read_file(path, parse, "--task", "lines of a class, a tab and a text")


def _dataset(spec: str, split: str) -> list[tuple[str, str]]:
    rows = read_table(spec, split, "--task", KINDS)
    text = next((column for column in ("text", "sentence") if column in rows.column_names), None)
    if text is None or "label" not in rows.column_names:
        raise InputError(f"--task: got {spec} with columns {', '.join(rows.column_names)}; allowed: label, and text")
    return [(str(row["label"]), row[text]) for row in rows]
