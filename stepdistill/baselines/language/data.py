"""Texts as tokens: packed to blocks, or prompts with completions; what counts is said by a mask, never by a token.

avatars              the captions of the embedded set, a text each
FILE.txt             one text; its last tenth is held out where --test names none
FILE.jsonl           a text a line ("text"), or a prompt and its completion ("prompt", "completion"), or prompts alone
wikitext             WikiText-2, through `datasets`
owner/name:config    any other `datasets` name, with a column "text"
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = "avatars, a .txt or .jsonl file, wikitext, or a datasets name (owner/name:config)"
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
T = TypeVar("T")
PIECE = 1 << 18  # characters that are tokenised at once: what the tokenizer remembers of each is 200 times as large
_CUT = re.compile(r"(?<=\S)(?= )")
HELD_OUT = 0.1  # of a file that has no test file beside it


@dataclass(frozen=True)
class Pair:
    """A prompt and what comes after it; None where a teacher is yet to say that."""

    prompt: str
    completion: str | None


@dataclass(frozen=True)
class Tokens:
    """N rows of S tokens: `prompt` columns of prompt, padded on the left, then a completion, padded on the right.

    Attributes:
        ids: (N, S) int64. attention: (N, S) bool, False for padding.
        counts: (N, S) bool: the tokens whose prediction is trained and measured. A row's first token never is.
        prompt: columns that generation begins with.
    """

    ids: Tensor
    attention: Tensor
    counts: Tensor
    prompt: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.attention[rows], self.counts[rows], self.prompt)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """`ids`, `attention` and `counts` of these rows, (B, S) each."""
        return {"ids": self.ids[indices], "attention": self.attention[indices], "counts": self.counts[indices]}


def open_texts(spec: str, split: str, *, test: str | None = None) -> list[str] | list[Pair]:
    """The texts, or pairs, of a split.

    Args:
        spec: see above. split: train or test. test: of a file, the one that is held out.

    Raises:
        InputError: there is no such text, or it is empty.
    """
    if spec == "avatars":
        from stepdistill.data import avatars

        return avatars.load(split).captions
    path = Path(spec).expanduser()
    if path.suffix in (".txt", ".jsonl"):
        other = test is not None and split == "test"
        path, flag = (Path(test).expanduser(), "--test") if other else (path, "--data")
        found = read_file(path, partial(_parse, path), flag, KINDS)
        if test is None:
            found = _cut(found, split)
    elif path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise InputError(f"--data: got {spec}, which is no text; allowed: {KINDS}")
    else:
        found = _dataset(WIKITEXT if spec == "wikitext" else spec, split)
    if not any(_said(text).strip() for text in found):
        raise InputError(f"--data: got {spec}, whose {split} text is empty; allowed: {KINDS}")
    return found


def joined(texts: Sequence[str | Pair]) -> list[str]:
    """Texts, of pairs the prompt and its completion, if it has one, in one."""
    return [f"{text.prompt}{text.completion or ''}" if isinstance(text, Pair) else text for text in texts]


def begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer itself puts before a text: Llama 3's <|begin_of_text|>; of GPT-2 and Qwen2 nothing. A model that
    was always shown it expects it."""
    first = tokenizer("").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def ask(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as a model is given it: in its chat template where it has one.

    Only prompts go through templates: several strip the reasoning from what an assistant says.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, asked: str) -> list[int]:
    """The tokens of a prompt, behind those of `begin`, which its chat template may have written already."""
    first, ids = begin(tokenizer), tokenizer(asked, add_special_tokens=False, verbose=False).input_ids
    return ids if ids[: len(first)] == first else first + ids


def stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Tensor:
    """All texts as one row of tokens (N,), the end-of-text token behind each, and nothing before.

    Args:
        limit: tokens at most; the rest is not tokenised.
    """
    ids = array("q")
    for part in _tokens(texts, tokenizer):
        ids.extend(part)
        if limit is not None and len(ids) >= limit:
            break
    return torch.from_numpy(np.array(ids[:limit]))


def pack(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block: int, *, prompt: int, limit: int | None = None
) -> Tokens:
    """Texts one behind the other, cut into blocks without padding, each behind the tokens of `begin`; what is left at
    the end is dropped.

    Args:
        block: S. prompt: tokens of a block that generation begins with. limit: blocks at most.

    Raises:
        InputError: there is less than one block.
    """
    first = torch.tensor(begin(tokenizer), dtype=torch.int64)
    size = block - len(first)
    ids = stream(texts, tokenizer, None if limit is None else limit * size)
    if len(ids) < size:
        raise InputError(f"corpus: got {len(ids)} tokens; allowed: {size} (--block) or more; give more text")
    ids = ids[: len(ids) // size * size].view(-1, size)
    ids = torch.cat([first.expand(len(ids), -1), ids], 1)
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[:, 0] = False
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), counts, prompt)


def pair_up(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, *, prompt: int, completion: int) -> Tokens:
    """Prompts, padded on the left, and completions with their end of text, padded on the right; the latter count.

    Args:
        pairs: prompts as they are given to a model, see `ask`.
        prompt: columns of prompt: of a longer one, its last tokens are kept, and those of `begin`.
        completion: columns of completion, end included: a longer one is cut, and has none.

    Raises:
        InputError: there are none.
    """
    if not pairs:
        raise InputError("corpus: got no prompts; allowed: one or more")
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(pairs), prompt + completion), pad)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    counts = torch.zeros_like(attention)
    kept = len(begin(tokenizer))
    for row, pair in enumerate(pairs):
        before = prompt_ids(tokenizer, pair.prompt) or [eos]
        before = before[:kept] + before[kept + max(len(before) - prompt, 0) :]
        after = [*tokenizer(pair.completion, add_special_tokens=False).input_ids, eos][:completion]
        first, end = prompt - len(before), prompt + len(after)
        ids[row, first:end] = torch.tensor(before + after)
        attention[row, first:end] = True
        counts[row, prompt:end] = True
    return Tokens(ids, attention, counts, prompt)


def read_file(path: Path, parse: Callable[[str], T], flag: str, allowed: str) -> T:
    """What `parse` makes of a text file.

    Args:
        flag, allowed: for the message.

    Raises:
        InputError: it cannot be read, or `parse` does not take what is in it.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{flag}: got {path}, which cannot be read ({reason}); allowed: {allowed}") from error


def read_table(spec: str, split: str, flag: str, allowed: str):
    """A split of a `datasets` name, or name:configuration.

    Raises:
        InputError: it could not be loaded.
    """
    from datasets import load_dataset

    name, _, config = spec.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except Exception as error:  # what it raises differs by what is missing
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{flag}: got {spec}, which could not be loaded ({reason}); allowed: {allowed}") from error


def held_apart(rows: list[T]) -> tuple[list[T], list[T]]:
    """All but the last tenth, and that."""
    place = round(len(rows) * (1 - HELD_OUT))
    return rows[:place], rows[place:]


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for text in texts:
        for piece in _pieces(text):
            yield tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        yield [tokenizer.eos_token_id]


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces, each of PIECE characters and what is left of a word. All but the first begin with a space that
    follows something: there byte-level tokenizers (GPT-2, Llama 3, Qwen2) cut anyway, and the tokens are those of the
    whole text."""
    first = 0
    while first < len(text):
        cut = _CUT.search(text, first + PIECE)
        end = cut.start() if cut else len(text)
        yield text[first:end]
        first = end


def _parse(path: Path, text: str) -> list[str] | list[Pair]:
    return [text] if path.suffix == ".txt" else [_row(json.loads(line)) for line in text.splitlines() if line]


def _cut(texts: list[str] | list[Pair], split: str) -> list[str] | list[Pair]:
    """The part of one file's texts that is this split's; one text alone is cut at the end of a line."""
    if len(texts) == 1 and isinstance(texts[0], str):
        text = texts[0]
        place = text.find("\n", round(len(text) * (1 - HELD_OUT))) + 1 or len(text)
        return [text[:place] if split == "train" else text[place:]]
    return held_apart(texts)[split != "train"]


def _row(row: dict) -> str | Pair:
    asked = "prompt" in row
    said = [row["prompt"], row.get("completion")] if asked else [row["text"]]
    if strange := [value for value in said if not isinstance(value, str) and (value is not None or not asked)]:
        raise TypeError(f"{json.dumps(strange[0])} is no text")
    return Pair(*said) if asked else said[0]


def _said(text: str | Pair) -> str:
    """What is learnt of a text, or of a pair: of a prompt alone, what is said to it."""
    if isinstance(text, str):
        return text
    return text.prompt if text.completion is None else text.completion


def _dataset(spec: str, split: str) -> list[str]:
    rows = read_table(spec, split, "--data", KINDS)
    if "text" not in rows.column_names:
        raise InputError(f"--data: got {spec} with columns {', '.join(rows.column_names)}; allowed: one named text")
    return ["".join(rows["text"])] if "wikitext" in spec.partition(":")[0] else list(rows["text"])
