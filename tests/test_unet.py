"""Denoisers call their networks as diffusers' own pipelines do."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from stepdistill.denoiser.load import as_teacher
from stepdistill.denoiser.unet import UNetDenoiser, guidance_embedding
from stepdistill.errors import InputError
from stepdistill.prediction import convert

T = torch.tensor([999.0, 19.0])


def x_t(channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, tiny.LATENT, tiny.LATENT, generator=torch.Generator().manual_seed(1))


def test_stable_diffusion_gets_the_timestep_and_the_token_states():
    pipe = tiny.sd()
    teacher = as_teacher(pipe, "tiny")
    cond = teacher.conditioner.encode(tiny.PROMPTS)
    theirs = pipe.unet(x_t(), T.long(), encoder_hidden_states=cond["text"]).sample
    assert torch.equal(teacher.denoiser.raw(x_t(), T, cond), theirs)
    assert teacher.denoiser.sample_shape == (4, tiny.LATENT, tiny.LATENT)


def test_sdxl_gets_pooled_text_and_sizes():
    pipe = tiny.sdxl()
    teacher = as_teacher(pipe, "tiny")
    cond = teacher.conditioner.encode(tiny.PROMPTS)
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    theirs = pipe.unet(x_t(), T.long(), encoder_hidden_states=cond["text"], added_cond_kwargs=added).sample
    ours = teacher.denoiser.raw(x_t(), T, cond)
    assert torch.equal(ours, theirs)
    for key in ("pooled", "time_ids"):  # neither is dropped on the way
        assert not torch.equal(teacher.denoiser.raw(x_t(), T, cond | {key: cond[key] * 2}), ours)


@pytest.mark.parametrize(("predicted", "kind"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
def test_the_output_is_of_the_kind_the_scheduler_names(predicted, kind):
    teacher = as_teacher(tiny.sd(predicted), "tiny")
    denoiser, cond = teacher.denoiser, teacher.conditioner.encode(tiny.PROMPTS)
    y = denoiser.raw(x_t(), T, cond)
    assert denoiser.kind == kind
    assert torch.equal(denoiser(x_t(), T, cond, kind=kind), y)
    expected = convert(y, x_t(), T, denoiser.schedule, src=kind, dst="x0")
    assert torch.equal(denoiser(x_t(), T, cond), expected)


def test_guidance_embedding_equals_diffusers_and_a_hand_computed_value():
    w = torch.tensor([0.0, 3.5, 7.0])
    theirs = tiny.sd().get_guidance_scale_embedding(w, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w, 256), theirs, atol=1e-6, rtol=0)
    embedded = guidance_embedding(torch.tensor([0.002]), 4)[0]  # angle 2 at rates 1 and 1/10000
    expected = [math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]
    torch.testing.assert_close(embedded, torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_w_conditioned_network_is_told_its_guidance_as_the_pipeline_tells_it():
    pipe = tiny.sd(unet_options={"time_cond_proj_dim": 256})
    teacher = as_teacher(pipe, "tiny")
    cond = teacher.conditioner.encode(tiny.PROMPTS)
    w = torch.tensor([6.5, 2.0])
    embedding = pipe.get_guidance_scale_embedding(w, embedding_dim=256)
    theirs = pipe.unet(x_t(), T.long(), encoder_hidden_states=cond["text"], timestep_cond=embedding).sample
    ours = teacher.denoiser.raw(x_t(), T, cond | {"guidance": w})
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert (ours - teacher.denoiser.raw(x_t(), T, cond | {"guidance": w + 1})).abs().max() > 1e-3


def test_missing_conditions_are_named():
    denoiser = as_teacher(tiny.sdxl(), "tiny").denoiser
    with pytest.raises(InputError, match="got none; allowed: pooled, text, time_ids"):
        denoiser.raw(x_t(), T)
    denoiser = as_teacher(tiny.sd(unet_options={"time_cond_proj_dim": 256}), "tiny").denoiser
    with pytest.raises(InputError, match=r"got text; allowed: guidance, text for this network; .*guidance = scale - 1"):
        denoiser.raw(x_t(), T, {"text": torch.zeros(2, 16, 16)})


def test_half_precision_weights_still_answer_in_float32():
    teacher = as_teacher(tiny.sdxl(), "tiny")
    cond = teacher.conditioner.encode(tiny.PROMPTS)
    exact = teacher.denoiser.raw(x_t(), T, cond)
    teacher.source.unet.to(torch.bfloat16)
    rough = teacher.denoiser.raw(x_t(), T, cond)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_forward_looks_at_nothing_on_the_device(family):
    # a meta tensor has no values: reading one, as `.item()` or a branch would, raises
    teacher = as_teacher(tiny.MAKERS[family](unet_options={"time_cond_proj_dim": 256}), "tiny")
    cond = {k: v.to("meta") for k, v in teacher.conditioner.encode(tiny.PROMPTS).items()}
    cond["guidance"] = torch.empty(2, device="meta")
    teacher.denoiser.to("meta")
    assert teacher.denoiser(x_t().to("meta"), T.to("meta"), cond).shape == x_t().shape


def test_pixel_networks_take_labels_where_they_have_classes():
    pipe = tiny.pixel(classes=5)
    denoiser = as_teacher(pipe, "tiny").denoiser
    labels = torch.tensor([4, 0])
    theirs = pipe.unet(x_t(3), T.long(), class_labels=labels).sample
    assert torch.equal(denoiser.raw(x_t(3), T, {"labels": labels}), theirs)
    with pytest.raises(InputError, match="got no labels; allowed: labels"):
        denoiser.raw(x_t(3), T)
    with pytest.raises(InputError, match="got labels; allowed: no condition"):
        as_teacher(tiny.pixel(), "tiny").denoiser.raw(x_t(3), T, {"labels": labels})


def test_of_a_learned_variance_output_the_first_half_is_the_prediction():
    pipe = tiny.pixel(learned_variance=True)
    y = as_teacher(pipe, "tiny").denoiser.raw(x_t(3), T)
    assert torch.equal(y, pipe.unet(x_t(3), T.long()).sample[:, :3])
    text = tiny.sd()
    wide = tiny.unet(16, out_channels=8)
    tiny.awaken(wide, 5)
    denoiser = UNetDenoiser(wide, as_teacher(text, "tiny").denoiser.schedule, "eps")
    assert denoiser.raw(x_t(), T, {"text": torch.ones(2, 16, 16)}).shape == x_t().shape
