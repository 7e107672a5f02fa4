"""Texts as tokens: packed into blocks, or prompts with completions; a mask, never a token, says what counts."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stepdistill.baselines.language.prompts import begin, prompt_ids
from stepdistill.baselines.language.texts import Pair
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 18  # characters tokenised at once: the tokenizer keeps 200 times as much memory for each
_CUT = re.compile(r"(?<=\S)(?= )")


@dataclass(frozen=True)
class Tokens:
    """N rows of S tokens: `prompt` columns of prompt, padded on the left, then a completion, padded on the right.

    Attributes:
        ids: (N, S) int64. attention: (N, S) bool, False for padding.
        counts: (N, S) bool: the tokens whose prediction is trained and measured. A row's first token never is.
        prompt: columns that generation starts from.
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


def stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Tensor:
    """All texts as one row of tokens (N,), with the end-of-text token after each, and nothing before.

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
    """Concatenates texts and cuts them into blocks without padding, each after the tokens of `begin`; the remainder is
    dropped.

    Args:
        block: S. prompt: tokens of a block that generation starts from. limit: blocks at most.

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
        pairs: prompts as they are passed to a model, see `chat_prompt`.
        prompt: columns of prompt: of a longer one, the last tokens are kept, and those of `begin`.
        completion: columns of completion, end of text included: a longer one is cut, and has no end, as one that had
            not `ended`.

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
        before = prompt_ids(tokenizer, pair.prompt)
        before = before[:kept] + before[kept + max(len(before) - prompt, 0) :]
        words = tokenizer(pair.completion, add_special_tokens=False).input_ids
        after = [*words, *([eos] * pair.ended)][:completion]
        first, end = prompt - len(before), prompt + len(after)
        ids[row, first:end] = torch.tensor(before + after)
        attention[row, first:end] = True
        counts[row, prompt:end] = True
    return Tokens(ids, attention, counts, prompt)


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for text in texts:
        for piece in _pieces(text):
            yield tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        yield [tokenizer.eos_token_id]


def _pieces(text: str) -> Iterator[str]:
    """Splits a text into pieces of PIECE characters and the rest of a word. All but the first start with a space after
    a non-space, where byte-level tokenizers (GPT-2, Llama 3, Qwen2) split anyway, so that the tokens are those of the
    whole text."""
    first = 0
    while first < len(text):
        cut = _CUT.search(text, first + PIECE)
        end = cut.start() if cut else len(text)
        yield text[first:end]
        first = end
