"""The divergence that both classifiers and language models are trained with."""

from __future__ import annotations

from torch import Tensor

from stepdistill.baselines.reduce import wide


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p - log q) over the last dimension: (..., V) to (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher at T ‖ student at T): (..., V) logits to (...), at least float32.

    T² keeps the gradient's size as T grows (Hinton et al. 2015, section 2.1); without it, it scales as 1/T².
    """
    student, teacher = ((wide(x) / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * kl(teacher, student)
