"""Divergences between next-token distributions of teacher T and student S: means over the tokens that count, in nats.

forward_kl         KL(T ‖ S)
reverse_kl         KL(S ‖ T)
generalized_jsd    β KL(T ‖ M) + (1 - β) KL(S ‖ M), M = β T + (1 - β) S          GKD, Agarwal et al. 2024, equation 1
skew_kl            KL(T ‖ α T + (1 - α) S)                                       DistiLLM, Ko et al. 2024, equation 3
skew_reverse_kl    KL(S ‖ (1 - α) T + α S)
contrastive_pair   skew_kl on the teacher's answers + skew_reverse_kl on S's own   DistiLLM-2, Ko et al. 2025

Logits are (B, S, V) and the mask (B, S): the logits at a position predict the token that the mask there is of, so shift
first (`shift`). Logits are divided by the temperature; no factor compensates. Computed in float32, or float64 if given,
at CHUNK positions at once: with a vocabulary of 150,000, one tensor of 4,096 positions is 2.5 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.baselines.divergence import kl
from stepdistill.baselines.reduce import masked_mean, wide

CHUNK = 256  # positions whose vocabulary is held several times at once


def shift(logits: Tensor, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Aligns logits with the tokens that they predict: the logits at position s predict token s + 1.

    Args:
        logits: (B, S, V). ids: (B, S). counts: (B, S), the tokens whose prediction counts.

    Returns:
        logits (B, S - 1, V), labels and mask (B, S - 1).
    """
    return logits[:, :-1], ids[:, 1:], counts[:, 1:]


def predicted(counts: Tensor) -> Tensor:
    """The number of predictions that count, from (B, S) tokens that do: a row's first is not predicted."""
    return counts[:, 1:].sum()


def each(values: Callable[..., Tensor], mask: Tensor, *tensors: Tensor) -> Tensor:
    """`values` of the N positions that the mask counts, CHUNK at once, and computed again in the backward pass, for
    which only the tensors at these positions are kept.

    Args:
        values: takes the tensors at n positions, (n, ...) each, to (n, ...). mask: (B, S). tensors: (B, S, ...) each.
    """
    for x in tensors:
        if x.shape[:2] != mask.shape:
            raise ValueError(f"mask: got shape {tuple(mask.shape)}; allowed: {tuple(x.shape[:2])}, that of the tokens")
    places = mask.nonzero(as_tuple=True)
    parts = zip(*(x[places].split(CHUNK) for x in tensors), strict=True)
    return torch.cat([checkpoint(values, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def mean(values: Callable[..., Tensor], mask: Tensor, *tensors: Tensor) -> Tensor:
    """The mean of `each` over the positions; 0 if none counts."""
    return masked_mean(each(values, mask, *tensors))


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """-log S(label): the mean over the mask."""
    return mean(lambda s, label: nn.functional.cross_entropy(wide(s), label, reduction="none"), mask, logits, labels)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(T ‖ S): the student has to cover everything that the teacher considers likely."""
    return _divergence(lambda s, t: kl(t, s), student_logits, teacher_logits, mask, temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(S ‖ T): the student must not generate what the teacher considers unlikely."""
    return _divergence(kl, student_logits, teacher_logits, mask, temperature)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, beta: float, temperature: float = 1.0
) -> Tensor:
    """β KL(T ‖ M) + (1 - β) KL(S ‖ M) with M = β T + (1 - β) S.

    As β goes to 0 or 1 this goes to 0, and, divided by β or 1 - β, to KL(T ‖ S) or KL(S ‖ T): at the ends themselves
    these are returned, as in trl.

    Raises:
        ValueError: β is not in [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: got {beta}; allowed: 0, KL(teacher || student), to 1, KL(student || teacher)")
    if beta in (0, 1):
        divergence = reverse_kl if beta else forward_kl
        return divergence(student_logits, teacher_logits, mask, temperature=temperature)

    def jsd(s: Tensor, t: Tensor) -> Tensor:
        m = log_mixture(t, s, beta)
        return beta * kl(t, m) + (1 - beta) * kl(s, m)

    return _divergence(jsd, student_logits, teacher_logits, mask, temperature)


def skew_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(T ‖ α T + (1 - α) S): finite even if the student assigns no probability, at most -log α."""
    skew = lambda s, t: kl(t, log_mixture(t, s, alpha))  # noqa: E731
    return _divergence(skew, student_logits, teacher_logits, mask, temperature)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(S ‖ (1 - α) T + α S)."""
    return _divergence(lambda s, t: kl(s, log_mixture(s, t, alpha)), student_logits, teacher_logits, mask, temperature)


def contrastive_pair(
    on_teachers: tuple[Tensor, Tensor, Tensor], on_students: tuple[Tensor, Tensor, Tensor], *, alpha: float = 0.1
) -> Tensor:
    """skew_kl on the teacher's answers + skew_reverse_kl on the student's.

    Args:
        on_teachers, on_students: the student's logits, the teacher's logits and the mask, on the answers of each.
    """
    return skew_kl(*on_teachers, alpha=alpha) + skew_reverse_kl(*on_students, alpha=alpha)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), for a share within (0, 1)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _divergence(
    divergence: Callable[[Tensor, Tensor], Tensor], student_logits: Tensor, teacher_logits: Tensor, mask: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """The mean over the mask of a divergence, which takes log S and log T, (n, V) each, to (n,)."""

    def values(*both: Tensor) -> Tensor:
        return divergence(*((wide(x) / temperature).log_softmax(-1) for x in both))

    return mean(values, mask, student_logits, teacher_logits)
