"""MiniLLM's loss: a clipped policy gradient on the mixture's texts, and each step's exact divergence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.divergence import kl
from stepdistill.baselines.language import losses
from stepdistill.baselines.language.generate import TokenBatch, evaluating, sample
from stepdistill.baselines.language.memory import Rollouts
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.reduce import masked_mean, wide
from stepdistill.methods.base import Clock, Loss


def rewards_after(rewards: Tensor, mask: Tensor) -> Tensor:
    """R_t+1 of each token: the mean reward of the tokens after it (length normalisation); 0 if there are none.

    Args:
        rewards, mask: (B, S).
    """
    kept = rewards.masked_fill(~mask, 0)
    sums = kept.flip(1).cumsum(1).flip(1) - kept
    behind = mask.flip(1).cumsum(1).flip(1) - mask.long()
    return sums / behind.clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Scales to mean 0 and variance 1 over the mask, as the authors' code does with the advantages of all processes."""
    mean = masked_mean(x, mask)
    return (x - mean) * torch.rsqrt(masked_mean((x - mean).square(), mask) + 1e-8)


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε) A), Schulman et al. (2017), of each token."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def chosen(log_probs: Tensor, labels: Tensor) -> Tensor:
    """log p(label): (..., V) and (...) to (...)."""
    return log_probs.gather(-1, labels[..., None]).squeeze(-1)


def log_likelihood(token_logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label): (B, S, V) logits to (B, S), float32, or float64 if given."""
    return chosen(wide(token_logits).log_softmax(-1), labels)


@dataclass(frozen=True)
class MiniLLM(Objective):
    """Single + long + corpus_weight × L_PT (section 2.2, algorithm 1):

        p̃ = mix p + (1 - mix) q,   w_t = q_old / p̃,   r_t = log p - log q_old   at the sampled token y_t ~ p̃
        single   w_t KL(q ‖ p) over the vocabulary: the step's own reward, without sampling
        long     R_t+1, the mean of r after t, whitened over the update, through the clipped ρ_t = q / p̃

    L_PT is cross-entropy on the task's own completions here, language modelling on a pretraining corpus in the paper.

    Attributes:
        mix: the teacher's share of the mixture. clip: ε. reuse: updates on the same texts.
        prompt: tokens of a sample that are continued. eos, pad: tokens.
    """

    mix: float
    clip: float
    reuse: int
    corpus_weight: float
    prompt: int
    eos: int
    pad: int

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student; the texts are kept in `models.rollouts`."""
        rolls: Rollouts = models.rollouts
        if clock.update % self.reuse == 0 and rolls.at_start:
            batches = batch.siblings() if batch.siblings else [batch]
            rolls.keep(self.sample_mixture(each, models) for each in batches)
        counted = rolls.counts[:, 1:]
        advantage = whiten(rewards_after(rolls.log_p - rolls.log_q, counted), counted)
        rows = rolls.next(len(batch["ids"]))
        ids, attention, counts = (
            torch.cat([getattr(rolls, name)[rows], batch[name]]) for name in ("ids", "attention", "counts")
        )
        student_logits, labels, mask = losses.shift(logits(models.student, ids, attention), ids, counts)
        n = len(batch["ids"])
        corpus = losses.cross_entropy(student_logits[n:], labels[n:], mask[n:])
        corpus = batch.weight(lambda each: losses.predicted(each["counts"])) * corpus
        with torch.no_grad():
            teacher_logits = logits(models.teacher, ids[:n], attention[:n])[:, :-1]
        log_p, log_q = rolls.log_p[rows], rolls.log_q[rows]
        single, long = self.pieces(
            student_logits[:n], teacher_logits, labels[:n], mask[:n], log_p, log_q, advantage[rows]
        )
        weight = mask[:n].sum() * batch.batches / counted.sum().clamp(min=1)  # see Batch.weight
        single, long = weight * single, weight * long
        total = single + long + self.corpus_weight * corpus
        return Loss(total, {"single": single, "long": long, "cross_entropy": corpus})

    def pieces(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor, log_p: Tensor,
        log_q: Tensor, advantage: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Returns the single-step and the long-term loss.

        Args:
            student_logits, teacher_logits: (B, S, V). labels, mask: (B, S).
            log_p, log_q: of the labels, by the teacher and by the student when they were sampled. advantage: (B, S).
        """
        log_mix = losses.log_mixture(log_p, log_q, self.mix)

        def values(
            student: Tensor, teacher: Tensor, label: Tensor, weight: Tensor, log_mix: Tensor, advantage: Tensor
        ) -> Tensor:
            log_probs = wide(student).log_softmax(-1)
            ratio = (chosen(log_probs, label) - log_mix).exp()
            exact = kl(log_probs, wide(teacher).log_softmax(-1))
            return torch.stack([weight * exact, clipped(ratio, advantage, self.clip)], -1)

        weight = (log_q - log_mix).exp()
        terms = losses.each(values, mask, student_logits, teacher_logits, labels, weight, log_mix, advantage)
        single, long = map(masked_mean, terms.unbind(-1))
        return single, long

    @torch.no_grad()
    def sample_mixture(self, batch: Batch, models: TeacherStudent) -> tuple[TokenBatch, Tensor, Tensor]:
        """Texts sampled from the mixture, and log p and log q of their tokens."""
        prompt, attention = batch["ids"][:, : self.prompt], batch["attention"][:, : self.prompt]
        generated = sample(
            [(models.teacher, self.mix), (models.bare, 1 - self.mix)], prompt, attention, batch.draws,
            new=batch["ids"].shape[1] - self.prompt, eos=self.eos, pad=self.pad,
        )  # fmt: skip
        with evaluating(models.bare):
            log_likelihoods = [
                log_likelihood(logits(network, generated.ids, generated.attention)[:, :-1], generated.ids[:, 1:])
                for network in (models.teacher, models.bare)
            ]
        return generated, *log_likelihoods
