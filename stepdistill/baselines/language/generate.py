"""Sampling from language models, with the samples' own random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill.baselines.language.models import positions
from stepdistill.draws import Draws, mix


@dataclass(frozen=True)
class TokenBatch:
    """B rows of tokens: of a corpus, or prompts with generated continuations. Of the latter, the prompt does not count,
    nor does anything after the first end of text, which itself counts.

    Attributes:
        ids: (B, S) int64. attention, counts: (B, S) bool, as in Tokens.
    """

    ids: Tensor
    attention: Tensor
    counts: Tensor


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Context in which the network is in evaluation mode, without dropout."""
    was = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was)


@torch.no_grad()
def sample(
    mixture: Sequence[tuple[nn.Module, float]], prompt: Tensor, attention: Tensor, draws: Draws, *, new: int, eos: int,
    pad: int, temperature: float = 1.0,
) -> TokenBatch:  # fmt: skip
    """Continues prompts with tokens sampled from a mixture of networks, Σ weight p(· | text so far).

    MiniLLM's mixture is [(teacher, 0.2), (student, 0.8)]; a student alone is [(student, 1.0)].

    Args:
        mixture: causal language models of one vocabulary, with weights that sum to 1.
        prompt: (B, P), padded on the left. attention: (B, P). draws: each row takes `new` numbers.
        new: tokens at most. eos: the token that ends a text. pad: the token after it. temperature: of each network.
    """
    uniform = torch.stack([draws.uniform() for _ in range(new)], 1).double()
    ids, seen = prompt, attention.bool()
    going = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
    counts = torch.zeros_like(seen)
    caches: list = [None] * len(mixture)
    with ExitStack() as stack:
        for network, _ in mixture:
            stack.enter_context(evaluating(network))
        for step in range(new):
            if not going.any():
                break
            probs = 0
            for i, (network, weight) in enumerate(mixture):
                fresh = slice(None) if step == 0 else slice(-1, None)
                out = network(
                    input_ids=ids[:, fresh], attention_mask=seen.long(), position_ids=positions(seen)[:, fresh],
                    past_key_values=caches[i], use_cache=True,
                )  # fmt: skip
                caches[i] = out.past_key_values
                probs = probs + weight * (out.logits[:, -1].double() / temperature).softmax(-1)
            token = torch.where(going, draw(probs, uniform[:, step]), pad)
            ids = torch.cat([ids, token[:, None]], 1)
            seen, counts = (torch.cat([x, going[:, None]], 1) for x in (seen, counts))
            going = going & (token != eos)
    missing = prompt.shape[1] + new - ids.shape[1]
    ids = nn.functional.pad(ids, (0, missing), value=pad)
    seen, counts = (nn.functional.pad(x, (0, missing)) for x in (seen, counts))
    return TokenBatch(ids, seen, counts)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes u: (B, V) and (B,) to (B,); never one of probability 0."""
    sums = probs.double().cumsum(-1)
    places = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    return places.squeeze(-1).clamp(max=probs.shape[-1] - 1)


def coin(seed: int, update: int) -> float:
    """A number in [0, 1) determined by seed and update, the same on all processes and for all its batches."""
    return Draws([mix(seed, ~update)]).uniform().item()
