"""What a language model is measured by: negative log-likelihood a token, perplexity, and texts to look at."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepdistill.baselines.language.data import Tokens
from stepdistill.baselines.language.models import logits


@torch.no_grad()
def perplexity(
    network: nn.Module, ids: Tensor, *, window: int = 1024, stride: int = 512, batch: int = 4
) -> dict[str, float]:
    """`nll`, nats a token, and `perplexity`, its exponential, of one text at a fixed stride.

    Windows begin `stride` tokens apart; of each, only what the one before did not have is scored, so that every token
    but the first is scored once, behind at least window - stride others where there are as many.

    Args:
        ids: (N,), N > 1. window: tokens seen at once. stride: 1 to window - 1: a window's first token is never scored.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride: got {stride}; allowed: 1 to {window - 1}, below the window")
    device = next(network.parameters()).device
    starts = [0, *range(stride, max(len(ids) - window + stride, 0), stride)]
    rows = torch.full((len(starts), window), int(ids[0]))
    attention, counts = (torch.zeros_like(rows, dtype=torch.bool) for _ in range(2))
    for row, start in enumerate(starts):
        part = ids[start : start + window]
        rows[row, : len(part)] = part
        attention[row, : len(part)] = True
        counts[row, 1 if row == 0 else window - stride : len(part)] = True
    total, n = 0.0, 0
    for at in range(0, len(starts), batch):
        one = slice(at, at + batch)
        values = token_nll(network, rows[one].to(device), attention[one].to(device))
        kept = counts[one, 1:].to(device)
        total += values.masked_fill(~kept, 0).double().sum().item()
        n += int(kept.sum())
    return {"nll": total / n, "perplexity": math.exp(min(total / n, 700.0))}


@torch.no_grad()
def mean_nll(network: nn.Module, data: Tokens, batch: int = 8) -> float:
    """Nats a token, over the tokens that count."""
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
    said = logits(network, ids, attention)[:, :-1]
    return nn.functional.cross_entropy(said.float().transpose(1, 2), ids[:, 1:], reduction="none")
