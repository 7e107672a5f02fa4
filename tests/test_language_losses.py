"""Divergences of language models against explicit sums, against trl, and against the usual mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import stepdistill as sd
from stepdistill.baselines import divergence
from stepdistill.baselines.language import losses, policy
from stepdistill.baselines.reduce import masked_mean

B, S, V = 3, 5, 7
BETAS = (0, 0.01, 0.1, 0.5, 0.9, 0.99, 1)


@pytest.fixture(params=range(3))
def logits_and_mask(request) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher in float64, and a mask with an all-false row."""
    g = torch.Generator().manual_seed(request.param)
    student, teacher = (3 * torch.randn(B, S, V, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(B, S, generator=g) < 0.6
    mask[0] = False
    return student, teacher, mask


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(p: list[float], q: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def written_out(divergence, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> float:
    """The mean over the mask of divergence(teacher's, student's probabilities), summed in Python."""
    values = [
        divergence(softmax(teacher[b, s].tolist(), temperature), softmax(student[b, s].tolist(), temperature))
        for b in range(len(mask))
        for s in range(mask.shape[1])
        if mask[b, s]
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_forward_and_reverse_kl_are_their_sums(logits_and_mask, temperature):
    forward = losses.forward_kl(*logits_and_mask, temperature=temperature)
    assert forward.item() == pytest.approx(written_out(kl, *logits_and_mask, temperature), abs=1e-10)
    reverse = losses.reverse_kl(*logits_and_mask, temperature=temperature)
    assert reverse.item() == pytest.approx(written_out(lambda t, s: kl(s, t), *logits_and_mask, temperature), abs=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd_is_its_sum(logits_and_mask, beta):
    def jsd(t: list[float], s: list[float]) -> float:
        if beta in (0, 1):
            return kl(s, t) if beta else kl(t, s)
        m = mix(t, s, beta)
        return beta * kl(t, m) + (1 - beta) * kl(s, m)

    for temperature in (0.7, 1.0):
        value = losses.generalized_jsd(*logits_and_mask, beta=beta, temperature=temperature)
        assert value.item() == pytest.approx(written_out(jsd, *logits_and_mask, temperature), abs=1e-10)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_skewed_divergences_are_their_sums(logits_and_mask, alpha):
    forward, reverse = (f(*logits_and_mask, alpha=alpha).item() for f in (losses.skew_kl, losses.skew_reverse_kl))
    assert forward == pytest.approx(written_out(lambda t, s: kl(t, mix(t, s, alpha)), *logits_and_mask), abs=1e-10)
    assert reverse == pytest.approx(written_out(lambda t, s: kl(s, mix(s, t, alpha)), *logits_and_mask), abs=1e-10)
    assert forward < -math.log(alpha)


def test_the_contrastive_pair_holds_each_half_against_its_own_answers(logits_and_mask):
    student, teacher, mask = logits_and_mask
    other = (teacher + 1, student * 0.5, ~mask)
    hand = written_out(lambda t, s: kl(t, mix(t, s, 0.1)), *logits_and_mask)
    hand += written_out(lambda t, s: kl(s, mix(s, t, 0.1)), *other)
    assert losses.contrastive_pair(logits_and_mask, other).item() == pytest.approx(hand, abs=1e-10)


def test_cross_entropy_is_its_sum(logits_and_mask):
    student, _, mask = logits_and_mask
    labels = torch.arange(B * S).view(B, S) % V
    hand = [-math.log(softmax(student[b, s].tolist())[labels[b, s]]) for b, s in mask.nonzero().tolist()]
    value = losses.cross_entropy(student, labels, mask).item()
    assert value == pytest.approx(sum(hand) / len(hand), abs=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd_is_that_of_trl(logits_and_mask, beta):
    pytest.importorskip("trl", reason="trl is not installed: pip install 'stepdistill[trl]'")
    from trl.experimental.gkd import GKDTrainer

    student, teacher, mask = logits_and_mask
    labels = torch.where(mask, 1, -100)
    for dtype in (torch.float32, torch.float64):
        pair = student.to(dtype), teacher.to(dtype)
        for temperature in (1.0, 2.0):
            theirs = GKDTrainer.generalized_jsd_loss(*pair, labels=labels, beta=beta, temperature=temperature)
            ours = losses.generalized_jsd(*pair, mask, beta=beta, temperature=temperature)
            assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_divided_by_the_interpolation_jsd_nears_the_divergence_of_its_end(logits_and_mask):
    small = 1e-6
    at_0 = losses.generalized_jsd(*logits_and_mask, beta=small).item() / small
    at_1 = losses.generalized_jsd(*logits_and_mask, beta=1 - small).item() / small
    assert at_0 == pytest.approx(losses.forward_kl(*logits_and_mask).item(), rel=1e-3)
    assert at_1 == pytest.approx(losses.reverse_kl(*logits_and_mask).item(), rel=1e-3)


def test_the_usual_reductions_are_a_length_too_large_and_a_vocabulary_too_small(logits_and_mask):
    """`batchmean` of (B, S, V) divides by B alone, `mean` by V too: without a mask both are off by exact factors."""
    student, teacher, _ = logits_and_mask
    everything = torch.ones(B, S, dtype=torch.bool)
    ours = losses.forward_kl(student, teacher, everything).item()
    pair = student.log_softmax(-1), teacher.log_softmax(-1)
    batchmean = torch.nn.functional.kl_div(*pair, reduction="batchmean", log_target=True).item()
    mean = torch.nn.functional.kl_div(*pair, reduction="mean", log_target=True).item()
    assert ours == pytest.approx(written_out(kl, student, teacher, everything), abs=1e-10)
    assert batchmean == pytest.approx(S * ours) and mean == pytest.approx(ours / V)


def test_what_does_not_count_changes_nothing_and_gets_no_gradient(logits_and_mask):
    student, teacher, mask = logits_and_mask
    other = torch.where(mask[..., None], student, student.roll(1, -1) + 9).requires_grad_(True)
    for loss in (losses.forward_kl, losses.reverse_kl, losses.skew_kl, losses.skew_reverse_kl):
        value = loss(other, teacher, mask)
        assert value.item() == loss(student, teacher, mask).item()
        (gradient,) = torch.autograd.grad(value, other)
        assert not gradient[~mask].any() and gradient[mask].any()


PLAIN = {  # without parts: of log S and log T, (B, S, V)
    "forward_kl": lambda s, t: divergence.kl(t, s),
    "reverse_kl": divergence.kl,
    "skew_kl": lambda s, t: divergence.kl(t, losses.log_mixture(t, s, 0.1)),
    "skew_reverse_kl": lambda s, t: divergence.kl(s, losses.log_mixture(s, t, 0.1)),
    "generalized_jsd": lambda s, t: (
        0.3 * divergence.kl(t, losses.log_mixture(t, s, 0.3)) + 0.7 * divergence.kl(s, losses.log_mixture(t, s, 0.3))
    ),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_in_parts_values_and_gradients_are_those_of_the_whole(logits_and_mask, name, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    student, teacher, mask = logits_and_mask
    student.requires_grad_(True)
    more = {"beta": 0.3} if name == "generalized_jsd" else {}
    value = getattr(losses, name)(student, teacher, mask, temperature=2.0, **more)
    whole = masked_mean(PLAIN[name](*((x / 2).log_softmax(-1) for x in (student, teacher))), mask)
    assert value.item() == pytest.approx(whole.item(), rel=0, abs=1e-12)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (value, whole))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12) and ours.abs().max() > 1e-3


@pytest.mark.parametrize("prompt", [0, 50])
def test_no_more_positions_are_held_at_once_for_a_longer_prompt(prompt, monkeypatch):
    """Ten tokens count, in parts of 4, 4 and 2. Nothing is kept for the backward pass, which computes them again."""
    seen = []

    def noted(log_p: Tensor, log_q: Tensor) -> Tensor:
        seen.append(log_p.shape[:-1])
        return divergence.kl(log_p, log_q)

    monkeypatch.setattr(losses, "CHUNK", 4)
    monkeypatch.setattr(losses, "kl", noted)
    student, teacher = (torch.randn(2, prompt + 5, V, requires_grad=grad) for grad in (True, False))
    mask = torch.arange(prompt + 5).expand(2, -1) >= prompt
    value = losses.reverse_kl(student, teacher, mask)
    assert seen == [(4,), (4,), (2,)]
    value.backward()
    assert sorted(seen[3:]) == [(2,), (4,), (4,)]


def test_all_means_are_the_shared_one(logits_and_mask, monkeypatch):
    for module in (losses, policy):
        monkeypatch.setattr(module, "masked_mean", lambda values, mask=None: values.new_tensor(7.0))
    student, teacher, mask = logits_and_mask
    for loss in (losses.forward_kl, losses.reverse_kl, losses.skew_kl, losses.skew_reverse_kl):
        assert loss(student, teacher, mask).item() == 7
    assert losses.generalized_jsd(student, teacher, mask, beta=0.5).item() == 7
    labels = student.argmax(-1)
    assert losses.cross_entropy(student, labels, mask).item() == 7
    log_p, log_q = (policy.log_likelihood(x, labels) for x in (teacher, student))
    own = policy.MiniLLM(mix=0.2, clip=0.2, reuse=1, corpus_weight=1.0, prompt=1, eos=1, pad=0)
    assert [x.item() for x in own.pieces(student, teacher, labels, mask, log_p, log_q, log_p)] == [7, 7]


def test_a_mask_of_other_tokens_is_refused(logits_and_mask):
    student, teacher, mask = logits_and_mask
    with pytest.raises(ValueError, match=r"mask: got shape \(3, 4\); allowed: \(3, 5\)"):
        losses.forward_kl(student, teacher, mask[:, 1:])


def test_nothing_to_count_is_0(logits_and_mask):
    student, teacher, mask = logits_and_mask
    assert losses.generalized_jsd(student, teacher, torch.zeros_like(mask), beta=0.5).item() == 0


def test_the_shift_puts_logits_beside_the_token_they_speak_of():
    """Two tokens, the first of which predicts the second with certainty: the loss is 0, and unshifted it is not."""
    ids = torch.tensor([[0, 1]])
    next_logits = torch.tensor(
        [[[-60.0, 60.0], [60.0, -60.0]]], dtype=torch.float64
    )  # after 0 comes 1, after 1 comes 0
    counts = torch.tensor([[False, True]])
    assert losses.cross_entropy(*losses.shift(next_logits, ids, counts)).item() == pytest.approx(0, abs=1e-10)
    unshifted = losses.cross_entropy(next_logits, ids, counts).item()
    assert unshifted == pytest.approx(120)


def test_a_divergence_without_the_shift_masks_other_places(logits_and_mask):
    student, teacher, mask = logits_and_mask
    ids = torch.zeros(B, S, dtype=torch.int64)
    shifted, _, kept = losses.shift(student, ids, mask)
    ours = losses.forward_kl(shifted, teacher[:, :-1], kept).item()
    places = [(b, s) for b in range(B) for s in range(1, S) if mask[b, s]]
    hand = [kl(softmax(teacher[b, s - 1].tolist()), softmax(student[b, s - 1].tolist())) for b, s in places]
    assert ours == pytest.approx(sum(hand) / len(hand), abs=1e-10)
    assert abs(losses.forward_kl(student, teacher, mask).item() - ours) > 1e-3


def test_half_precision_is_summed_in_float32(logits_and_mask):
    student, teacher, mask = logits_and_mask
    half = student.bfloat16(), teacher.bfloat16()
    value = losses.generalized_jsd(*half, mask, beta=0.5)
    exact = losses.generalized_jsd(*(x.double() for x in half), mask, beta=0.5)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_beta_outside_0_to_1_is_refused(logits_and_mask):
    with pytest.raises(ValueError, match=r"beta: got 1\.5; allowed: 0"):
        losses.generalized_jsd(*logits_and_mask, beta=1.5)


def test_the_contract_is_reached_from_the_package(logits_and_mask):
    assert sd.baselines.language.losses.generalized_jsd is losses.generalized_jsd
