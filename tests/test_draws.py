"""Draws belong to a sample: independent of batch, process and resume, and new at every call."""

import math

import pytest
import torch

from stepdistill.draws import Draws


def everything(draws):
    return draws.normal(2, 3), draws.uniform(), draws.integers(50), draws.normal()


@pytest.mark.parametrize("split", [1, 3, 7])
def test_a_samples_numbers_do_not_depend_on_its_batch(split):
    together = everything(Draws.at(5, 100, 8))
    parts = zip(everything(Draws.at(5, 100, split)), everything(Draws.at(5, 100 + split, 8 - split)), strict=True)
    for whole, (first, rest) in zip(together, parts, strict=True):
        assert torch.equal(whole, torch.cat([first, rest]))


def test_shapes_and_dtypes():
    draws = Draws.at(0, 0, 4)
    normal, uniform, integers, single = everything(draws)
    assert (normal.shape, normal.dtype) == ((4, 2, 3), torch.float32)
    assert (uniform.shape, uniform.dtype) == ((4,), torch.float32)
    assert (integers.shape, integers.dtype) == ((4,), torch.int64)
    assert single.shape == (4,)
    assert len(draws) == 4


def test_calls_are_fresh_and_the_order_of_calls_is_the_only_state():
    draws = Draws.at(0, 0, 4)
    first, second = draws.normal(3), draws.normal(3)
    assert not torch.equal(first, second)
    again = Draws.at(0, 0, 4)
    assert torch.equal(again.normal(3), first) and torch.equal(again.normal(3), second)


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = Draws.at(0, 0, 2).normal(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(Draws.at(0, 0, 2).normal(3), first)


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (0, 2**40)])
def test_other_seeds_and_other_counters_draw_other_numbers(seeds):
    streams = torch.cat([Draws.at(seed, 0, 500).normal() for seed in seeds])
    assert len(streams.unique()) == len(streams)
    one, other = streams.chunk(2)
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 4 / math.sqrt(500)


def test_numbers_across_samples_have_their_laws():
    n = 4000
    draws = Draws.at(3, 0, n)
    normal, uniform, integers = draws.normal(), draws.uniform(), draws.integers(10)
    assert abs(normal.mean()) < 4 / math.sqrt(n) and abs(normal.std() - 1) < 4 / math.sqrt(2 * n)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4 / math.sqrt(12 * n)
    assert (integers.bincount(minlength=10) - n / 10).abs().max() < 4 * math.sqrt(n * 0.09)
