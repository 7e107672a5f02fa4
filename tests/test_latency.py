"""Stages are timed where they happen, network evaluations are counted, and nothing is left behind on the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from stepdistill.errors import InputError
from stepdistill.evaluation import latency, schedulers, spec
from stepdistill.evaluation.generate import Sampler, Series
from stepdistill.evaluation.latency import Stages, measure, quantile


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd()


@pytest.mark.parametrize(("guidance", "steps", "nfe"), [(1.0, 1, 1), (1.0, 3, 3), (4.0, 1, 2), (4.0, 3, 6)])
def test_nfe_counts_guidances_second_half(pipe, guidance, steps, nfe):
    timing = measure(Sampler(pipe, guidance), ["a cat"], steps=steps, batch=2, warmup=0, repeats=1)
    assert timing.nfe == nfe


def test_heun_costs_two_evaluations_a_step_but_the_last(pipe):
    heun = tiny.sd()
    heun.scheduler = schedulers.scheduler_of(heun, spec.parse("x,scheduler=heun"))
    assert measure(Sampler(heun), ["a cat"], steps=4, warmup=0, repeats=1).nfe == 7


def test_every_stage_is_timed_as_often_as_it_runs(pipe):
    with Stages(pipe) as stages:
        Sampler(pipe, 2.0)({"prompt": ["a cat", "a dog"]}, first=0, count=2, steps=3)
    found = {stage: len(times) for stage, times in stages.milliseconds().items()}
    assert found == {"text": 2, "denoiser_step": 3, "decode": 1}
    assert all(t > 0 for times in stages.milliseconds().values() for t in times)


def test_a_row_tells_how_often_and_by_which_clock_calls_were_timed(pipe):
    row = measure(Sampler(pipe), ["a cat"], steps=2, warmup=1, repeats=3).row()
    assert row["total_p50"] <= row["total_p90"] and row["repeats"] == 3 and row["clock"] == "wall"


def test_the_pipeline_is_left_as_it_was(pipe):
    with Stages(pipe):
        pass
    assert "decode" not in vars(pipe.vae)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks and not pipe.text_encoder._forward_hooks


def test_quantiles_are_linear_between_order_statistics():
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5 and quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)


class Clock:
    """A clock advanced only by calls of a pipeline's parts, each by a given number of seconds."""

    def __init__(self, pipe, **seconds) -> None:
        self.now, self.told = 0.0, {name: iter(values) for name, values in seconds.items()}
        for name in self.told:
            part = getattr(pipe, name)
            if name == "vae":
                decode = part.decode
                part.decode = lambda *a, d=decode, **k: (self.tick("vae"), d(*a, **k))[1]
            else:
                part.register_forward_hook(lambda *_, name=name: self.tick(name))

    def tick(self, name: str) -> None:
        self.now += next(self.told[name])


def test_quantiles_are_those_of_the_calls_and_the_first_call_is_apart(monkeypatch):
    pipe, calls = tiny.sd(), 5
    unet = [9.0, 9.0] + [0.01 * i for i in range(1, 2 * calls + 1)]
    clock = Clock(pipe, text_encoder=[7.0] + [0.002 * i for i in range(1, calls + 1)], unet=unet, vae=[5.0] + [0.1] * 5)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    timing = measure(Sampler(pipe), ["a cat"], steps=2, warmup=1, repeats=calls)
    steps = [10.0 * i for i in range(1, 11)]
    totals = [2.0 * i + steps[2 * i - 2] + steps[2 * i - 1] + 100 for i in range(1, 6)]
    taken = {"text": [2, 4, 6, 8, 10], "denoiser_step": steps, "decode": [100] * 5, "total": totals}
    for stage, values in taken.items():
        wanted = [np.quantile(values, q) for q in (0.5, 0.9, 0.99)]
        assert timing.quantiles[stage] == pytest.approx(wanted, rel=1e-9)
    assert (timing.text, timing.denoiser_step, timing.decode) == pytest.approx((6, 55, 100))
    assert (timing.total_p50, timing.total_p90, timing.total_p99) == pytest.approx(timing.quantiles["total"])
    assert timing.row()["first"] == 1000 * (7 + 9 + 9 + 5)


def test_compiling_is_in_the_first_call_alone_and_is_undone(monkeypatch):
    pipe, clock = tiny.sd(), [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    asked: list[dict] = []

    def compiled(forward, **options):
        asked.append(options)
        seconds = iter([60.0])

        def run(*args, **kwargs):
            clock[0] += next(seconds, 0.5)
            return forward(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    timing = measure(Sampler(pipe), ["a cat"], steps=1, warmup=1, repeats=3, compiled=True)
    assert asked == [{"dynamic": False}] and timing.row()["compiled"]
    assert (timing.first, timing.denoiser_step, timing.total_p99) == (60000, 500, 500)
    assert "forward" not in vars(pipe.unet)


def test_channels_last_lays_out_network_and_decoder_and_draws_the_same():
    plain, laid = tiny.sd(), tiny.sd()
    latency.channels_last(laid)
    for part in (laid.unet, laid.vae):
        weights = [p for p in part.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert not plain.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    pictures = [Sampler(p)({"prompt": ["a cat"]}, first=0, count=1, steps=2).int() for p in (plain, laid)]
    assert (pictures[0] - pictures[1]).abs().max() <= 1


def test_a_batch_of_zero_is_refused(pipe):
    with pytest.raises(InputError, match="batch=0"):
        measure(Sampler(pipe), ["a"], steps=1, batch=0)


def test_a_pixel_pipeline_is_timed_too():
    timing = measure(Sampler(tiny.pixel()), [], steps=2, batch=2, warmup=0, repeats=1)
    assert timing.nfe == 2 and timing.text == 0 and timing.decode == 0


def test_pictures_do_not_depend_on_the_batch_they_are_in(pipe):
    sampler, prompts = Sampler(pipe, 2.0, seed=5), ["a cat", "a dog", "a hat"]
    together = sampler(sampler.encode(prompts), first=0, count=3, steps=2)
    last = sampler({"prompt": prompts[2:]}, first=2, count=1, steps=2)
    assert (together[2:].int() - last.int()).abs().max() <= 1
    assert not torch.equal(together[0], together[1])


def test_a_series_draws_what_the_plain_call_draws_and_counts_its_evaluations(pipe, monkeypatch):
    sampler, prompts, kind = Sampler(pipe, 2.0, seed=5), ["a cat", "a dog", "a hat"], type(pipe)
    drawn = Series(sampler, prompts, n=3, batch=2).draw(2, 1, 2)
    plain = sampler(sampler.encode(prompts[1:]), first=1, count=2, steps=2)
    assert torch.equal(drawn.pictures, plain) and drawn.evaluations == 2 * 2 * 2
    monkeypatch.setattr(pipe.unet, "forward", None)
    with pytest.raises(TypeError):
        Series(sampler, prompts, n=3, batch=2).draw(2, 1, 2)
    assert type(pipe) is kind and not pipe.unet._forward_pre_hooks  # the pipeline is itself again, also after an error


def test_every_network_is_compiled_however_many_there_were_before():
    """By default dynamo gives up on a function after eight compilations."""
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        compile_ = torch.compile
        patch.setattr(torch, "compile", lambda forward, **options: compile_(forward, backend=backend, **options))
        for width in range(1, 12):
            network, x = torch.nn.Sequential(torch.nn.Linear(width, 1)), torch.ones(1, width)
            own = network(x)
            before = len(made)
            with latency.compiled_network(network):
                assert torch.equal(network(x), own)
            assert len(made) == before + 1 and "forward" not in network.__dict__


def test_a_forward_that_was_put_on_a_network_is_there_again_afterwards():
    network = torch.nn.Linear(1, 1)
    network.forward = own = lambda x: 2 * x
    with latency.compiled_network(network):
        pass
    assert network.__dict__["forward"] is own
