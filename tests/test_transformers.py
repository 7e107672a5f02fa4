"""SD3, Flux, PixArt and Sana behind the common call signature, checked against their own pipelines."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill.conditioning.base import expand
from stepdistill.denoiser.load import as_teacher
from stepdistill.errors import InputError
from stepdistill.sampling import sample
from stepdistill.schedules import AlphaBar, RectifiedFlow
from stepdistill.timegrid import Grid

SIZE = tiny.LATENT * tiny.FACTOR
EULER = {"sd3": {}, "flux": {}, "sana": {"use_resolution_binning": False}, "pixart": {"use_resolution_binning": False}}


def drawn(pipe, family: str, x_T: torch.Tensor, *, steps: int, guidance: float) -> torch.Tensor:
    """The pipeline's own latents from noise x_T."""
    latents = x_T
    if family == "flux":
        latents = pipe._pack_latents(x_T, len(x_T), x_T.shape[1], *x_T.shape[2:])
    out = pipe(
        list(tiny.PROMPTS), num_inference_steps=steps, guidance_scale=guidance, latents=latents, output_type="latent",
        height=SIZE, width=SIZE, **EULER[family],
    ).images  # fmt: skip
    return pipe._unpack_latents(out, SIZE, SIZE, pipe.vae_scale_factor) if family == "flux" else out


def guided_twice(family: str) -> bool:
    """Whether the pipeline's guidance_scale means a second forward: dev takes it as an input instead."""
    return family != "flux"


@pytest.mark.parametrize("family", list(EULER))
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_our_sampler_paints_what_the_pipeline_paints(family, steps, guidance):
    pipe = tiny.make(family)
    if family == "sana":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if family == "pixart":
        options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    teacher = as_teacher(pipe, "tiny").resize((SIZE, SIZE))
    assert teacher.image_size == (SIZE, SIZE)
    x_T = torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.conditioner.encode(tiny.PROMPTS)
    uncond = expand(teacher.conditioner.unconditional(1), 2)
    ours = sample(teacher.denoiser, x_T, cond, uncond, steps=steps, guidance=guidance)
    theirs = drawn(pipe, family, x_T, steps=steps, guidance=guidance)
    torch.testing.assert_close(ours, theirs.float(), atol=2e-5 * theirs.abs().max().item(), rtol=0)
    other = sample(teacher.denoiser, x_T, cond, uncond, steps=steps, guidance=guidance + 1)
    assert (other - ours).abs().max() > 1e-3 * ours.abs().max()


@pytest.mark.parametrize("family", list(EULER))
def test_the_process_and_the_grid_come_from_the_pipeline(family):
    teacher = as_teacher(tiny.make(family), "tiny")
    if family == "pixart":
        assert isinstance(teacher.denoiser.schedule, AlphaBar) and teacher.denoiser.kind == "eps"
        assert teacher.denoiser.grid == Grid()
        return
    assert isinstance(teacher.denoiser.schedule, RectifiedFlow) and teacher.denoiser.kind == "flow"
    expected = {"sd3": Grid("linspace", 3.0), "sana": Grid("linspace", 3.0)}
    if family == "flux":  # 1024 pixels are 64 x 64 patches: log(shift) is the scheduler's max_shift
        assert teacher.denoiser.grid.spacing == "trailing"
        assert teacher.denoiser.grid.shift == pytest.approx(2.718281828**1.15, rel=1e-6)
    else:
        assert teacher.denoiser.grid == expected[family]


def test_pixart_alpha_is_told_the_pictures_size():
    pipe = tiny.pixart(sized=True)
    teacher = as_teacher(pipe, "tiny")
    cond = teacher.conditioner.encode(tiny.PROMPTS, size=(48, 32))
    assert cond["resolution"].tolist() == [[48.0, 32.0]] * 2 and cond["aspect_ratio"].tolist() == [[1.5]] * 2
    x, t = torch.randn(2, *teacher.sample_shape), torch.tensor([3.0, 900.0])
    theirs = pipe.transformer(
        x, encoder_hidden_states=cond["text"], encoder_attention_mask=cond["text_mask"], timestep=t,
        added_cond_kwargs={"resolution": cond["resolution"], "aspect_ratio": cond["aspect_ratio"]},
    ).sample[:, :4]  # fmt: skip
    torch.testing.assert_close(teacher.denoiser.raw(x, t, cond), theirs)
    with pytest.raises(InputError, match="allowed: aspect_ratio, resolution, text, text_mask"):
        teacher.denoiser.raw(x, t, {"text": cond["text"], "text_mask": cond["text_mask"]})


def test_schnell_is_told_no_guidance_and_dev_must_be():
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    for embeds in (True, False):
        denoiser = as_teacher(tiny.flux(guidance_embeds=embeds), "tiny").denoiser
        assert denoiser.takes_guidance == embeds
        cond = {"text": torch.randn(2, 5, 16), "pooled": torch.randn(2, 16)}
        if embeds:
            with pytest.raises(InputError, match=r"allowed: guidance, pooled, text .*add guidance = scale - 1"):
                denoiser.raw(x, t, cond)
        else:
            assert denoiser.raw(x, t, cond).shape == x.shape
