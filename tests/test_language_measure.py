"""Strided perplexity against scoring each token alone, and a student's own text against its teacher."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_decoders import Constant, sentences, tiny_decoder, tokenizer

from stepdistill.baselines.language import losses, measure
from stepdistill.baselines.language.generate import TokenBatch
from stepdistill.baselines.language.measure import continuations, mean_nll, own_kl, perplexity, write_generations
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.tokens import pack, pair_up, stream


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(40, 16, 8), (41, 16, 5), (16, 16, 8), (9, 16, 8), (33, 16, 15)]
)
@torch.no_grad()
def test_every_token_is_scored_once_behind_what_its_window_shows(length, window, stride):
    network = tiny_decoder().network
    ids = stream(sentences(20), tokenizer(), length)
    values = []
    for i in range(1, length):
        start = 0 if i < window else math.ceil((i - window + 1) / stride) * stride  # of the first window with it
        log_probs = network(input_ids=ids[None, start:i]).logits[0, -1].double().log_softmax(-1)
        values.append(-log_probs[ids[i]].item())
    found = perplexity(network, ids, window=window, stride=stride)
    assert found["nll"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))


def test_a_window_that_moves_by_all_of_itself_is_refused():
    with pytest.raises(ValueError, match="stride: got 16; allowed: 1 to 15"):
        perplexity(tiny_decoder().network, torch.arange(40), window=16, stride=16)


@torch.no_grad()
def test_of_completions_the_mean_is_over_their_tokens_not_over_rows():
    network = tiny_decoder().network
    rows = pair_up([Pair("a", " dog"), Pair("the cat", " sees red hats.")], tokenizer(), prompt=4, completion=12)
    log_probs = logits(network, rows.ids, rows.attention).double().log_softmax(-1)
    values = [-log_probs[b, s - 1, rows.ids[b, s]].item() for b, s in rows.counts.nonzero().tolist()]
    assert mean_nll(network, rows, batch=1) == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_divergence_on_ones_own_text_is_that_of_the_two_and_0_from_itself():
    student, teacher = Constant([0.2, 0.3, 0.5]), Constant([0.6, 0.3, 0.1])
    decoder = tiny_decoder()
    generated = continuations(student, decoder, pack(sentences(9), tokenizer(), 12, prompt=4), seed=0)
    hand = 0.2 * math.log(0.2 / 0.6) + 0.5 * math.log(0.5 / 0.1)
    assert own_kl(student, teacher, generated) == pytest.approx(hand, abs=1e-6)
    assert own_kl(student, student, generated) == 0


def test_of_own_texts_of_several_lengths_the_mean_is_over_tokens_and_few_rows_are_held_at_once(monkeypatch):
    """Two networks' logits of all rows would be several gigabytes with the vocabulary of Llama 3."""
    student, teacher = tiny_decoder(seed=1), tiny_decoder(seed=2)
    pairs = [Pair("a", " dog"), Pair("the cat", " sees red hats."), Pair("the", " old owl")]
    rows = pair_up(pairs, tokenizer(), prompt=4, completion=12)
    generated = TokenBatch(rows.ids, rows.attention, rows.counts)
    student_logits, teacher_logits = (logits(model.network, rows.ids, rows.attention) for model in (student, teacher))
    whole = losses.reverse_kl(student_logits[:, :-1], teacher_logits[:, :-1], rows.counts[:, 1:]).item()
    seen = []

    def noted(network, ids, attention):
        seen.append(len(ids))
        return logits(network, ids, attention)

    monkeypatch.setattr(measure, "logits", noted)
    assert own_kl(student.network, teacher.network, generated) == pytest.approx(whole, rel=1e-6)
    assert max(seen) <= 2 and sum(seen) == 2 * len(pairs)


def test_what_all_say_stands_side_by_side(tmp_path):
    write_generations(
        tmp_path / "a.md", ["one", "two"], {"teacher": ["A", "B"], "student, seed 0": ["C<|end|>", "D\nE"]}
    )
    text = (tmp_path / "a.md").read_text()
    assert "> two\n\n- **teacher**: B\n- **student, seed 0**: D E" in text and "C\\<|end|>" in text
