"""MiniLLM: rewards, weights and clipping computed by hand, its gradient, and reused texts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_resume import stop_at
from tiny_decoders import sentences, tiny_decoder, tokenizer

from stepdistill.baselines.base import Batch, TeacherStudent
from stepdistill.baselines.language import losses
from stepdistill.baselines.language.generate import sample
from stepdistill.baselines.language.memory import Rollouts
from stepdistill.baselines.language.minillm import MiniLLMConfig
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.language.policy import MiniLLM, clipped, log_likelihood, rewards_after, whiten
from stepdistill.baselines.language.tokens import Tokens, pack
from stepdistill.baselines.learner import Learner
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock
from stepdistill.training.config import LoopConfig
from stepdistill.training.order import sample_indices

PROMPT, BLOCK = 4, 12


def data() -> Tokens:
    return pack(sentences(30), tokenizer(), BLOCK, prompt=PROMPT)


def objective(**changes) -> MiniLLM:
    settings = {"mix": 0.2, "clip": 0.2, "reuse": 3, "corpus_weight": 1.0, "prompt": PROMPT, "eos": 2, "pad": 0}
    return MiniLLM(**settings | changes)


def teacher_student(rows: int = 2) -> TeacherStudent:
    return TeacherStudent(tiny_decoder(seed=1).network, tiny_decoder(seed=2).network, rollouts=Rollouts(rows, BLOCK))


def batch(first: int = 0) -> Batch:
    return Batch(data().batch([first, first + 1]), Draws.at(0, first, 2))


@pytest.fixture
def pieces() -> dict[str, torch.Tensor]:
    """Random inputs of the losses: two texts of six tokens, some of which count; a vocabulary of five."""
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    labels = torch.randint(5, (2, 6), generator=g)
    student_logits, teacher_logits = (2 * torch.randn(2, 6, 5, generator=g, dtype=torch.float64) for _ in range(2))
    old = student_logits + 0.3 * torch.randn(2, 6, 5, generator=g, dtype=torch.float64)
    log_p, log_q = log_likelihood(teacher_logits, labels), log_likelihood(old, labels)
    return {"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels, "mask": mask,
            "log_p": log_p, "log_q": log_q,
            "advantage": whiten(rewards_after(log_p - log_q, mask), mask)}  # fmt: skip


def test_the_reward_of_a_token_is_the_mean_of_those_behind_it():
    rewards = torch.tensor([[9.0, 1.0, 2.0, 6.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    assert rewards_after(rewards, mask)[mask].tolist() == [4.0, 6.0, 0.0]
    with_its_own = torch.tensor([3.0, 4.0, 6.0])  # the single-step term already has that one exactly
    assert not torch.equal(rewards_after(rewards, mask)[mask], with_its_own)


def test_whitening_is_over_what_counts():
    x, mask = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]])
    assert whiten(x, mask)[mask].tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -2.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 2.0),
    ],
)
def test_a_ratio_beyond_the_clip_pulls_no_further(ratio, advantage, value, slope):
    r = torch.tensor(ratio, requires_grad=True)
    loss = clipped(r, torch.tensor(float(advantage)), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(value) and r.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_both_losses_are_their_sums_written_out(pieces, dtype, rel):
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in pieces.items()}
    single, long = objective().pieces(**given)
    assert single.dtype == long.dtype == dtype
    kept = pieces["mask"].nonzero().tolist()
    p, q = (pieces[n].double().softmax(-1) for n in ("teacher_logits", "student_logits"))
    log_p, log_q = pieces["log_p"].double(), pieces["log_q"].double()
    mix = {(b, t): 0.2 * log_p[b, t].exp().item() + 0.8 * log_q[b, t].exp().item() for b, t in kept}
    after = {}
    for b, t in kept:
        behind = [(log_p[b, i] - log_q[b, i]).item() for b_, i in kept if b_ == b and i > t]
        after[b, t] = sum(behind) / len(behind) if behind else 0.0
    mean = sum(after.values()) / len(kept)
    spread = math.sqrt(sum((r - mean) ** 2 for r in after.values()) / len(kept) + 1e-8)
    singles, longs = [], []
    for b, t in kept:
        exact = sum((q[b, t, v] * (q[b, t, v] / p[b, t, v]).log()).item() for v in range(5))
        singles.append(log_q[b, t].exp().item() / mix[b, t] * exact)
        ratio = q[b, t, pieces["labels"][b, t]].item() / mix[b, t]
        advantage = (after[b, t] - mean) / spread
        longs.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
    assert single.item() == pytest.approx(sum(singles) / len(kept), rel=rel)
    assert long.item() == pytest.approx(sum(longs) / len(kept), rel=rel)


def test_of_ones_own_words_the_gradient_is_that_of_the_policy(pieces):
    """Without a teacher in the mixture and before any update, weights and ratios are 1, which leaves -A ∇log q."""
    student_logits = pieces["student_logits"].clone().requires_grad_(True)
    log_q = log_likelihood(pieces["student_logits"], pieces["labels"])
    own = {**pieces, "student_logits": student_logits, "log_q": log_q}
    _, long = objective(mix=1e-9).pieces(**own)
    (ours,) = torch.autograd.grad(long, student_logits)
    plain = -(own["advantage"] * log_likelihood(student_logits, own["labels"]))[own["mask"]].mean()
    (hand,) = torch.autograd.grad(plain, student_logits)
    assert torch.allclose(ours, hand, atol=1e-6) and hand.abs().max() > 1e-2


def test_texts_are_said_once_and_used_three_times_with_what_held_when_they_were_said():
    models = teacher_student()
    seen = []
    for update in range(4):
        objective().loss("student", batch(2 * update), models, Clock(update, 10))
        seen.append({name: value.clone() for name, value in models.rollouts.named_buffers()})
        with torch.no_grad():
            for p in models.bare.parameters():
                p.mul_(1.01)
    assert all(torch.equal(seen[0][n], seen[u][n]) for u in (1, 2) for n in ("ids", "log_p", "log_q", "counts"))
    assert not torch.equal(seen[3]["ids"], seen[0]["ids"])
    assert torch.equal(seen[3]["ids"][:, :PROMPT], batch(6)["ids"][:, :PROMPT])


def test_kept_likelihoods_are_those_of_the_two_who_spoke():
    models = teacher_student()
    loss = objective().loss("student", batch(), models, Clock(0, 10))
    rolls = models.rollouts
    for name, network in (("log_p", models.teacher), ("log_q", models.bare)):
        log_probs = logits(network, rolls.ids, rolls.attention)[:, :-1].double().log_softmax(-1)
        hand = log_probs.gather(-1, rolls.ids[:, 1:, None]).squeeze(-1)
        assert torch.allclose(getattr(rolls, name).double(), hand, atol=1e-5)
    q, p = (logits(m, rolls.ids, rolls.attention).double().softmax(-1) for m in (models.bare, models.teacher))
    singles = []
    for b, i in rolls.counts.nonzero().tolist():  # what stands at i - 1 tells the token at i
        own, theirs, token = q[b, i - 1], p[b, i - 1], rolls.ids[b, i]
        weight = own[token] / (0.2 * theirs[token] + 0.8 * own[token])
        singles.append((weight * (own * (own / theirs).log()).sum()).item())
    assert loss.terms["single"].item() == pytest.approx(sum(singles) / len(singles), rel=1e-5)
    rows = batch()
    student_logits = logits(models.student, rows["ids"], rows["attention"])
    corpus = losses.cross_entropy(*losses.shift(student_logits, rows["ids"], rows["counts"]))
    assert loss.terms["cross_entropy"].item() == pytest.approx(corpus.item(), rel=1e-5)
    assert loss.total.item() == pytest.approx(sum(v.item() for v in loss.terms.values()), rel=1e-6)


def test_a_fifth_of_what_is_said_is_the_teachers():
    models, rows = teacher_student(), batch()
    generated, *_ = objective().sample_mixture(rows, models)
    prompts = rows["ids"][:, :PROMPT], rows["attention"][:, :PROMPT]
    hand, swapped = (
        sample([(models.teacher, share), (models.bare, 1 - share)], *prompts, Draws.at(0, 0, 2), new=BLOCK - PROMPT,
               eos=2, pad=0)
        for share in (0.2, 0.8)
    )  # fmt: skip
    assert torch.equal(generated.ids, hand.ids) and not torch.equal(hand.ids, swapped.ids)


@pytest.mark.parametrize("weight", [0.0, 0.25, 3.0])
def test_the_text_weighs_as_much_as_is_asked_for(weight):
    loss = objective(corpus_weight=weight).loss("student", batch(), teacher_student(), Clock(0, 10))
    terms = {name: value.item() for name, value in loss.terms.items()}
    whole = terms["single"] + terms["long"] + weight * terms["cross_entropy"]
    assert loss.total.item() == pytest.approx(whole, rel=1e-6) and terms["cross_entropy"] > 1


def learner(place: Path, accumulation: int, size: int) -> Learner:
    """A learner whose updates are of four texts that never end, so that all batches have as many tokens."""
    config = LoopConfig(out=place, max_train_steps=4, batch_size=size, gradient_accumulation=accumulation,
                        learning_rate=1e-2, adam_epsilon=1e-3)  # fmt: skip
    return Learner(objective(eos=-1), teacher_student(rows=4), data(), config)


def test_batches_of_an_update_have_texts_of_their_own(tmp_path):
    run = learner(tmp_path, 2, 2)
    run.step()
    prompts = torch.cat([run.batch(n)["ids"] for n in range(2)])[:, :PROMPT]
    assert torch.equal(run.models.rollouts.ids[:, :PROMPT], prompts) and len({*map(tuple, prompts.tolist())}) > 1


def test_an_update_in_two_batches_is_that_of_one(tmp_path):
    """Advantages are whitened over the whole update: within each batch, they would be other numbers."""
    found, students = [], []
    for accumulation, size in ((1, 4), (2, 2)):
        run = learner(tmp_path / str(size), accumulation, size)
        found.append([{name: term.item() for name, term in run.step().items()} for _ in range(4)])  # two sets of texts
        students.append(run.models.bare)
    for whole, split in zip(*found, strict=True):
        assert split == pytest.approx(whole, rel=1e-4)
    both = zip(*(student.parameters() for student in students), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in both)


def test_an_update_on_two_processes_is_that_of_one(tmp_path, monkeypatch):
    """One after the other: what `gather` returns on both is what each of them says alone."""
    run = learner(tmp_path, 1, 4)
    whole = objective(eos=-1).loss("student", run.batch(0), run.models, Clock(0, 10))
    own = [Batch(data().batch(sample_indices(0, n, 2, len(data()))), Draws.at(0, n, 2), batches=2) for n in (0, 2)]
    monkeypatch.setattr("stepdistill.baselines.base.reduce", lambda count, _: 2 * count)  # both have as many tokens
    samples = [objective(eos=-1).sample_mixture(part, teacher_student()) for part in own]
    found = []
    for rank, part in enumerate(own):
        texts, *likelihoods = zip(*samples, strict=True)
        every = [[getattr(x, name) for x in texts] for name in ("ids", "attention", "counts")] + likelihoods
        gathered = iter([torch.cat(list(x)) for x in every])
        monkeypatch.setattr("accelerate.utils.gather", lambda _, gathered=gathered: next(gathered))
        state = SimpleNamespace(num_processes=2, process_index=rank)
        monkeypatch.setattr("accelerate.PartialState", lambda state=state: state)
        found.append(objective(eos=-1).loss("student", part, teacher_student(rows=4), Clock(0, 10)))
    for name in ("single", "long", "cross_entropy"):
        mean = sum(loss.terms[name].item() for loss in found) / 2
        assert mean == pytest.approx(whole.terms[name].item(), rel=1e-5), name


def test_gradients_reach_the_student_alone():
    models = teacher_student()
    objective().loss("student", batch(), models, Clock(0, 10)).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in models.bare.parameters())
    assert all(p.grad is None for p in models.teacher.parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_cut_between_uses_of_the_same_texts_changes_nothing(tmp_path, accumulation):
    config = LoopConfig(out=tmp_path, max_train_steps=7, batch_size=2, learning_rate=1e-2, checkpoint_every=2,
                        gradient_accumulation=accumulation)  # fmt: skip

    def start(name: str) -> Learner:
        models = teacher_student(rows=2 * accumulation)
        return Learner(objective(), models, data(), dataclasses.replace(config, out=tmp_path / name))

    stop_at(start("cut"), 5)  # resumes from update 4, whose texts are from update 3
    start("cut").fit()
    start("whole").fit()
    a, b = (load_file(tmp_path / name / "weights" / "student.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [{"mix": 0.0}, {"clip": 1.0}, {"reuse": 0}, {"corpus_weight": -1.0}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(InputError, match=f"{next(iter(changes))}: got"):
        MiniLLMConfig(**changes).check()
