"""Measurements of a language model: negative log-likelihood per token, perplexity, and generated texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill import files
from stepdistill.baselines.language import losses
from stepdistill.baselines.language.generate import TokenBatch, sample
from stepdistill.baselines.language.models import Decoder, logits
from stepdistill.baselines.language.tokens import Tokens
from stepdistill.draws import Draws

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTE = (
    "nll: nats per token of the held-out text; own_kl: KL(student || teacher), nats per token, over each one's own "
    "continuations of held-out prompts, which are in generations.md"
)
CONTINUATION_STREAM = 0x5A17  # the stream of random numbers for continuing held-out prompts


@torch.no_grad()
def perplexity(
    network: nn.Module, ids: Tensor, *, window: int = 1024, stride: int = 512, batch: int = 4, first: Sequence[int] = ()
) -> dict[str, float]:
    """`nll`, nats per token, and `perplexity`, its exponential, of one text at a fixed stride.

    Windows start `stride` tokens apart; each scores only the tokens that the one before did not have, so that every
    token but the first is scored once, after at least window - stride others if there are as many.

    Args:
        ids: (N,), N > 1. window: tokens seen at once. stride: 1 to window - 1: a window's first token is never scored.
        first: tokens before each window, seen in addition; see tokens.begin.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride: got {stride}; allowed: 1 to {window - 1}, below the window")
    device = next(network.parameters()).device
    starts = [0, *range(stride, max(len(ids) - window + stride, 0), stride)]
    before = len(first)
    rows = torch.full((len(starts), before + window), int(ids[0]))
    rows[:, :before] = torch.tensor(first, dtype=torch.int64)
    attention, counts = (torch.zeros_like(rows, dtype=torch.bool) for _ in range(2))
    for row, start in enumerate(starts):
        part = ids[start : start + window]
        end = before + len(part)
        rows[row, before:end] = part
        attention[row, :end] = True
        counts[row, before + (1 if row == 0 else window - stride) : end] = True
    total, n = 0.0, 0
    for at in tqdm(range(0, len(starts), batch), "measuring", leave=False, dynamic_ncols=True):
        one = slice(at, at + batch)
        values = token_nll(network, rows[one].to(device), attention[one].to(device))
        kept = counts[one, 1:].to(device)
        total += values.masked_fill(~kept, 0).double().sum().item()
        n += int(kept.sum())
    return with_perplexity(total / n)


def with_perplexity(nll: float) -> dict[str, float]:
    """`nll`, and `perplexity`, its exponential."""
    return {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}


@torch.no_grad()
def mean_nll(network: nn.Module, data: Tokens, batch: int = 8) -> float:
    """Nats per token, over the tokens that count."""
    device = next(network.parameters()).device
    total, n = 0.0, 0
    for at in range(0, len(data), batch):
        part = data[at : at + batch]
        kept = part.counts[:, 1:].to(device)
        values = token_nll(network, part.ids.to(device), part.attention.to(device))
        total += values.masked_fill(~kept, 0).double().sum().item()
        n += int(kept.sum())
    return total / max(n, 1)


def token_nll(network: nn.Module, ids: Tensor, attention: Tensor) -> Tensor:
    """-log p(token | those before it) of each token but a row's first: (B, S) to (B, S - 1), float32."""
    next_logits = logits(network, ids, attention)[:, :-1]
    return nn.functional.cross_entropy(next_logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


def continuations(network: nn.Module, teacher: Decoder, held: Tokens, seed: int) -> TokenBatch:
    """A network's continuations of held-out prompts; with the same seed, all networks draw the same numbers."""
    device = next(network.parameters()).device
    prompt, attention = (x[:, : held.prompt].to(device) for x in (held.ids, held.attention))
    draws, new = Draws.at(seed ^ CONTINUATION_STREAM, 0, len(held), device), held.ids.shape[1] - held.prompt
    return sample([(network, 1.0)], prompt, attention, draws, new=new, eos=teacher.eos, pad=teacher.pad)


@torch.no_grad()
def own_kl(network: nn.Module, teacher: nn.Module, generated: TokenBatch) -> float:
    """KL(network || teacher), nats per token, over the text that the network itself generated; a row at once, as two
    networks' logits of it may be a gigabyte each."""
    total, n = 0.0, 0
    for row in range(len(generated.ids)):
        ids, attention, counts = (x[row : row + 1] for x in (generated.ids, generated.attention, generated.counts))
        network_logits, teacher_logits = (logits(model, ids, attention) for model in (network, teacher))
        network_logits, _, mask = losses.shift(network_logits, ids, counts)
        count = int(mask.sum())
        total += losses.reverse_kl(network_logits, teacher_logits[:, :-1], mask).item() * count
        n += count
    return total / max(n, 1)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor, kept: Tensor) -> list[str]:
    """The texts of rows of tokens, of which only those in `kept` are decoded."""
    return [tokenizer.decode(row[mask].tolist()) for row, mask in zip(ids, kept.bool(), strict=True)]


def write_generations(file: Path, prompts: Sequence[str], generations: Mapping[str, Sequence[str]]) -> None:
    """Writes the prompts, each followed by every network's continuation."""
    lines = ["# What each says after the same prompts, drawn by the same random numbers", ""]
    for i, prompt in enumerate(prompts):
        lines += [f"## {i + 1}", "", f"> {_line(prompt)}", ""]
        lines += [f"- **{name}**: {_line(texts[i])}" for name, texts in generations.items()] + [""]
    files.write(file, "\n".join(lines))


def _line(text: str) -> str:
    return " ".join(text.replace("<", "\\<").split())
