"""Stages are timed where they happen, network evaluations are counted, and nothing is left behind on the pipeline."""

from __future__ import annotations

import pytest
import tiny
import torch

from stepdistill.errors import InputError
from stepdistill.evaluation import spec
from stepdistill.evaluation.generate import Sampler
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
    heun.scheduler = spec._scheduler(heun, spec.parse("x,scheduler=heun"))
    assert measure(Sampler(heun), ["a cat"], steps=4, warmup=0, repeats=1).nfe == 7


def test_every_stage_is_timed_as_often_as_it_runs(pipe):
    with Stages(pipe) as stages:
        Sampler(pipe, 2.0)({"prompt": ["a cat", "a dog"]}, first=0, count=2, steps=3)
    found = {stage: len(times) for stage, times in stages.milliseconds().items()}
    assert found == {"text": 2, "denoiser_step": 3, "decode": 1}
    assert all(t > 0 for times in stages.milliseconds().values() for t in times)


def test_stages_are_within_the_whole(pipe):
    timing = measure(Sampler(pipe), ["a cat"], steps=2, warmup=1, repeats=3)
    row = timing.row()
    assert row["text"] + 2 * row["denoiser_step"] + row["decode"] <= 1.5 * row["total_p90"]
    assert row["total_p50"] <= row["total_p90"] and row["repeats"] == 3 and row["clock"] == "wall"


def test_the_pipeline_is_left_as_it_was(pipe):
    with Stages(pipe):
        pass
    assert "decode" not in vars(pipe.vae)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks and not pipe.text_encoder._forward_hooks


def test_quantiles_are_linear_between_order_statistics():
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5 and quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)


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
