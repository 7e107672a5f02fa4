"""Masked language modelling (Devlin et al. 2019, section 3.1): lines of text, their masking, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.language.encoders import MaskedLM
from stepdistill.baselines.reduce import masked_mean, wide
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK_TOKEN_SHARE = 0.8  # of masked tokens that become the mask token; half of the rest become any token, half stay


@dataclass(frozen=True)
class Lines:
    """N pieces of text, padded on the right: ids (N, S), attention (N, S) False for padding."""

    ids: Tensor
    attention: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """Returns the pieces at these indices, cut to the longest of them."""
        attention = self.attention[indices]
        longest = int(attention.sum(1).max())
        return {"ids": self.ids[indices, :longest], "attention": attention[:, :longest]}


@dataclass(frozen=True)
class Masking:
    """How an encoder's input is masked.

    Attributes:
        rate: share of the tokens, special ones aside, that are masked. length: tokens of the longest piece.
        mask: the mask token. special: tokens that are never masked. vocabulary: its size.
    """

    rate: float
    length: int
    mask: int
    special: tuple[int, ...]
    vocabulary: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocabulary: int, length: int, rate: float) -> Masking:
        """The masking for a tokenizer."""
        return cls(rate, length, tokenizer.mask_token_id, tuple(sorted(tokenizer.all_special_ids)), vocabulary)

    def __call__(self, ids: Tensor, attention: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The masked input, and which tokens are to be predicted: both (B, S), S up to `length`."""
        size = ids.shape[1]
        chance, fate = (draws.uniform(self.length)[:, :size] for _ in range(2))
        random_ids = draws.integers(self.vocabulary, self.length)[:, :size]
        maskable = attention.bool() & ~torch.isin(ids, torch.tensor(self.special, device=ids.device))
        is_masked = maskable & (chance < self.rate)
        random_or_same = torch.where(fate < (1 + MASK_TOKEN_SHARE) / 2, random_ids, ids)
        replacement = torch.where(fate < MASK_TOKEN_SHARE, self.mask, random_or_same)
        return torch.where(is_masked, replacement, ids), is_masked

    def of_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same for a batch of Lines."""
        return batch.ahead("masked", lambda each: self(each["ids"], each["attention"], each.draws))


@dataclass(frozen=True)
class MaskedModelling(Objective):
    """-log p(masked tokens | masked input): the loss of teachers without a head, and of controls."""

    masking: Masking

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The mean over the masked tokens."""
        masked_ids, is_masked = self.masking.of_batch(batch)
        _, logits = models.student(masked_ids, batch["attention"], is_masked)
        value = masked_mean(nn.functional.cross_entropy(wide(logits), batch["ids"][is_masked], reduction="none"))
        value = batch.weight(lambda each: self.masking.of_batch(each)[1].sum()) * value
        return Loss(value, {"masked": value})


def cut_lines(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None) -> Lines:
    """Cuts each line of the texts into pieces of `length` tokens, the special ones around them included.

    Args:
        limit: pieces at most.

    Raises:
        InputError: no line has words in it.
    """
    pieces: list[list[int]] = []
    for line in (line for text in texts for line in text.splitlines() if line.strip()):
        tokens = tokenizer(line.strip(), add_special_tokens=False, verbose=False).input_ids
        pieces += [tokens[at : at + length - 2] for at in range(0, len(tokens), length - 2)]
        if limit is not None and len(pieces) >= limit:
            break
    return surround(pieces[:limit], tokenizer, length)


def surround(pieces: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, length: int) -> Lines:
    """Puts pieces of at most length - 2 tokens between cls and sep, padded on the right to `length`.

    Raises:
        InputError: there are none.
    """
    if not pieces:
        raise InputError("corpus: got no words; allowed: a line of text or more; give another --data")
    ids = torch.full((len(pieces), length), tokenizer.pad_token_id)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece) + 2] = torch.tensor([tokenizer.cls_token_id, *piece, tokenizer.sep_token_id])
        attention[row, : len(piece) + 2] = True
    return Lines(ids, attention)


@torch.no_grad()
def masked_lm_metrics(network: MaskedLM, held: Lines, masking: Masking, batch: int = 32) -> dict[str, float]:
    """`masked_nll`, nats per masked token, and `masked_accuracy`; the masking is the same for every network."""
    device = next(network.parameters()).device
    nll, correct, count = 0.0, 0, 0
    for first in tqdm(range(0, len(held), batch), "measuring", leave=False, dynamic_ncols=True):
        items = held.batch(list(range(first, min(first + batch, len(held)))))
        ids, attention = (items[name].to(device) for name in ("ids", "attention"))
        masked_ids, is_masked = masking(ids, attention, Draws.at(0, first, len(ids), device))
        logits = network(masked_ids, attention, is_masked)[1].float()
        nll += nn.functional.cross_entropy(logits, ids[is_masked], reduction="sum").item()
        correct += (logits.argmax(-1) == ids[is_masked]).sum().item()
        count += int(is_masked.sum())
    return {"masked_nll": nll / max(count, 1), "masked_accuracy": correct / max(count, 1)}
