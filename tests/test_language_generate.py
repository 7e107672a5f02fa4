"""Generation: sampled tokens against the probabilities they are drawn from, and which tokens count."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import Constant, tiny_decoder, tokenizer

from stepdistill.baselines.language.generate import coin, draw, sample
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.tokens import pair_up
from stepdistill.draws import Draws

NEW = 10
PAIRS = [Pair("the cat", ""), Pair("a dog likes the old", ""), Pair("the old owl sees", "")]


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    rows = pair_up(PAIRS, tokenizer(), prompt=12, completion=1)
    return rows.ids[:, :12], rows.attention[:, :12]


def numbers(rows: int = 3) -> torch.Tensor:
    draws = Draws.at(5, 0, rows)
    return torch.stack([draws.uniform() for _ in range(NEW)], 1).double()


def generate(network, *, temperature: float = 1.0, eos: int = -1, rows: slice = slice(None)):
    ids, attention = (x[rows] for x in prompts())
    draws = Draws([g.initial_seed() for g in Draws.at(5, 0, 3).generators[rows]])
    return sample([(network, 1.0)], ids, attention, draws, new=NEW, eos=eos, pad=0, temperature=temperature)


def test_a_token_is_where_the_summed_probabilities_pass_the_number():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75]]).expand(5, -1)
    assert draw(probs, torch.tensor([0.0, 0.2499, 0.25, 0.6, 0.999999])).tolist() == [1, 1, 3, 3, 3]


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    counts = draw(probs.expand(10_000, -1), uniform).bincount(minlength=4)
    assert counts.tolist() == [1000, 0, 6000, 3000]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@torch.no_grad()
def test_word_by_word_and_all_at_once_say_the_same(kind, temperature):
    """Caches, left padding and positions, against one call on the whole text."""
    network = tiny_decoder(kind).network
    generated = generate(network, temperature=temperature)
    probs = (logits(network, generated.ids, generated.attention).double() / temperature).softmax(-1)
    again = [draw(probs[:, 11 + i], numbers()[:, i]) for i in range(NEW)]
    assert torch.equal(torch.stack(again, 1), generated.ids[:, 12:])
    assert len({tuple(row) for row in generated.ids[:, 12:].tolist()}) == 3


def test_a_sample_says_the_same_in_any_batch():
    network = tiny_decoder().network
    whole = generate(network).ids
    assert torch.equal(generate(network, rows=slice(1, 3)).ids, whole[1:])


@pytest.mark.parametrize("pad", [0, 1])
def test_the_prompt_and_what_stands_behind_the_first_end_do_not_count(pad):
    """A model that ends or continues by the number drawn: with u < 1/2 it generates 1, the end, which may pad too."""
    network, u = Constant([0.0, 0.5, 0.5]), numbers()
    ids, attention = prompts()
    generated = sample([(network, 1.0)], ids, attention, Draws.at(5, 0, 3), new=NEW, eos=1, pad=pad)
    for row, values in enumerate(u.tolist()):
        ends = next(i for i, value in enumerate(values) if value < 0.5)
        tokens = [2] * ends + [1]
        assert generated.ids[row, 12:].tolist() == tokens + [pad] * (NEW - len(tokens))
        assert generated.counts[row].tolist() == [False] * 12 + [True] * len(tokens) + [False] * (NEW - len(tokens))
        assert torch.equal(generated.attention[row], torch.cat([attention[row], generated.counts[row, 12:]]))
    assert network.calls < NEW  # no call once all rows have ended


def test_a_mixture_is_drawn_from_the_mean_of_what_its_voices_say():
    a, b = [0.7, 0.1, 0.2], [0.1, 0.8, 0.1]
    ids, attention = prompts()
    mixture = [(Constant(a), 0.2), (Constant(b), 0.8)]
    generated = sample(mixture, ids, attention, Draws.at(5, 0, 3), new=NEW, eos=-1, pad=0)
    mean = torch.tensor([[0.2 * x + 0.8 * y for x, y in zip(a, b, strict=True)]]).double()
    hand = [[draw(mean, u[None]).item() for u in row] for row in numbers()]
    assert generated.ids[:, 12:].tolist() == hand


def test_what_is_said_has_no_dropout_and_training_goes_on_with_it():
    network = tiny_decoder("gpt2", resid_pdrop=0.5).network
    quiet = generate(network).ids
    network.train()
    assert torch.equal(generate(network).ids, quiet) and network.training


def test_no_gradient_goes_through_what_was_said():
    assert not any(p.grad is not None for p in tiny_decoder().network.parameters())
    generated = generate(Constant([0.3, 0.7]))
    assert not generated.ids.requires_grad and not generated.counts.requires_grad


def test_a_coin_belongs_to_its_update():
    values = [coin(0, update) for update in range(2000)]
    assert values == [coin(0, update) for update in range(2000)] and values[:5] != [coin(1, u) for u in range(5)]
    assert sum(value < 0.3 for value in values) / 2000 == pytest.approx(0.3, abs=0.03)
