"""The texts that language models are trained and measured on, from any source.

avatars              the captions of the embedded set, one text each
FILE.txt             one text; its last tenth is held out unless --test names a file
FILE.jsonl           a text per line ("text"), or a prompt and its completion ("prompt", "completion"), or prompts alone
wikitext             WikiText-2, through `datasets`
owner/name:config    any other `datasets` name, with a column "text"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from stepdistill.baselines.base import check_unused
from stepdistill.errors import InputError

KINDS = "avatars, a .txt or .jsonl file, wikitext, or a datasets name (owner/name:config)"
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
HELD_OUT = 0.1  # of a file without a separate test file
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion; None if a teacher has yet to generate it. `ended`: whether its text ends there."""

    prompt: str
    completion: str | None
    ended: bool = True


def open_texts(spec: str, split: str, *, test: str | None = None) -> list[str] | list[Pair]:
    """Opens the texts, or pairs, of a split.

    Args:
        spec: see above. split: train or test. test: for a file, the held-out file.

    Raises:
        InputError: there is no such text, or it is empty.
    """
    path, flag = Path(spec).expanduser(), "--data"
    of_file = path.suffix in (".txt", ".jsonl")
    if not of_file:
        check_unused("--test", test, f"--data {spec}")
    if spec == "avatars":
        from stepdistill.data import avatars

        return avatars.load(split).captions
    if of_file:
        from_test_file = test is not None and split == "test"
        path, flag = (Path(test).expanduser(), "--test") if from_test_file else (path, flag)
        texts = read_file(path, partial(_parse, path), flag, KINDS)
        if test is None:
            texts = _cut(texts, split)
    elif path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise InputError(f"--data: got {spec}, which is no text; allowed: {KINDS}")
    else:
        texts = _dataset(WIKITEXT if spec == "wikitext" else spec, split)
    if not any(_required_text(text).strip() for text in texts):
        got = path if flag == "--test" else spec
        raise InputError(f"{flag}: got {got}, whose {split} text is empty; allowed: {KINDS}")
    return texts


def check_kinds(train: Sequence[str | Pair], test: Sequence[str | Pair]) -> None:
    """Raises InputError if some of a run's texts are plain and others are prompts."""
    pairs = [sum(isinstance(text, Pair) for text in part) for part in (train, test)]
    plain = [len(part) - count for part, count in zip((train, test), pairs, strict=True)]
    if any(pairs) and any(plain):
        raise InputError(
            f"data: got {pairs[0]:,} prompts and {plain[0]:,} texts to train on, and held out {pairs[1]:,} and "
            f"{plain[1]:,}; allowed: all prompts, or all texts; fix the files of --data and --test"
        )


def joined(texts: Sequence[str | Pair]) -> list[str]:
    """Texts as strings; of a pair, the prompt followed by its completion, if it has one."""
    return [f"{text.prompt}{text.completion or ''}" if isinstance(text, Pair) else text for text in texts]


def read_file(path: Path, parse: Callable[[str], T], flag: str, allowed: str) -> T:
    """Returns what `parse` makes of a text file's content.

    Args:
        flag, allowed: for the error message.

    Raises:
        InputError: it cannot be read, or `parse` rejects its content.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{flag}: got {path}, which cannot be read ({reason}); allowed: {allowed}") from error


def read_table(spec: str, split: str, flag: str, allowed: str):
    """Loads a split of a `datasets` name, or name:configuration.

    Raises:
        InputError: it could not be loaded.
    """
    from datasets import load_dataset

    name, _, config = spec.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except Exception as error:  # the type depends on what is missing
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{flag}: got {spec}, which could not be loaded ({reason}); allowed: {allowed}") from error


def encodable(text: str) -> str:
    r"""Returns a text; raises ValueError if it has half of a surrogate pair, as "\ud800" in JSON, which no tokenizer
    reads."""
    text.encode("utf-8")
    return text


def held_apart(rows: list[T]) -> tuple[list[T], list[T]]:
    """Splits rows into all but the last tenth, and the last tenth."""
    place = round(len(rows) * (1 - HELD_OUT))
    return rows[:place], rows[place:]


def _parse(path: Path, text: str) -> list[str] | list[Pair]:
    return [text] if path.suffix == ".txt" else [_row(json.loads(line)) for line in text.split("\n") if line.strip()]


def _cut(texts: list[str] | list[Pair], split: str) -> list[str] | list[Pair]:
    """The part of a file's texts that belongs to this split; a single text is cut at the end of a line."""
    if len(texts) == 1 and isinstance(texts[0], str):
        text = texts[0]
        place = text.find("\n", round(len(text) * (1 - HELD_OUT))) + 1 or len(text)
        return [text[:place] if split == "train" else text[place:]]
    return held_apart(texts)[split != "train"]


def _row(row: dict) -> str | Pair:
    has_prompt = "prompt" in row
    values = [row["prompt"], row.get("completion")] if has_prompt else [row["text"]]
    if strange := [value for value in values if not isinstance(value, str) and (value is not None or not has_prompt)]:
        raise TypeError(f"{json.dumps(strange[0])} is no text")
    for value in values:
        encodable(value or "")
    return Pair(*values) if has_prompt else values[0]


def _required_text(text: str | Pair) -> str:
    """The part of a text or pair that must not be empty: the completion; the prompt, if that is to be generated."""
    if isinstance(text, str):
        return text
    return text.prompt if text.completion is None else text.completion


def _dataset(spec: str, split: str) -> list[str]:
    rows = read_table(spec, split, "--data", KINDS)
    if "text" not in rows.column_names:
        raise InputError(f"--data: got {spec} with columns {', '.join(rows.column_names)}; allowed: one named text")
    return ["".join(rows["text"])] if "wikitext" in spec.partition(":")[0] else list(rows["text"])
