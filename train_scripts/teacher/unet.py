"""The denoiser: a small text-conditioned UNet on cached latents, and the whole pipeline around it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from teacher.autoencoder import latents_of, load_vae
from teacher.loop import Budget, Figures, Run, images_of, last_loss, train
from teacher.text import load_text, tokenize
from torch import Tensor

from stepdistill.data import avatars


def run_unet(
    run: Run, sizes: dict, scheduler: dict, budget: Budget, caption_dropout: float, dtype: str, start: str | None
) -> Figures:
    """Trains v-prediction on cached latents and text states (Salimans and Ho 2022, eq. 10), then writes the pipeline.

    `start` is a pipeline folder whose UNet is trained further, instead of random weights.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    vae = load_vae(run)
    tokenizer, tower = load_text(run)
    noise_scheduler = DDIMScheduler(**scheduler)
    alpha_bar = noise_scheduler.alphas_cumprod.to(run.device)
    unet = UNet2DConditionModel(cross_attention_dim=tower.config.hidden_size, **sizes).to(run.device)
    if start:
        unet.load_state_dict(load_file(Path(start) / "unet" / "diffusion_pytorch_model.safetensors"))
    latents = latents_of(vae, images_of("train", run.device)) * vae.config.scaling_factor
    with torch.no_grad():
        ids = tokenize(tokenizer, ["", *avatars.load("train").captions], run.device)
        states = torch.cat([tower(b).last_hidden_state.to(torch.bfloat16) for b in ids.split(500)])
    empty, states = states[:1], states[1:]

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (budget.batch_size,), generator=generator)
        t = torch.randint(len(alpha_bar), (budget.batch_size,), generator=generator).to(run.device)
        eps = torch.randn(budget.batch_size, *latents.shape[1:], generator=generator).to(run.device)
        drop = torch.rand(budget.batch_size, 1, 1, generator=generator).to(run.device) < caption_dropout
        x0, text = latents[index], torch.where(drop, empty, states[index])
        alpha, sigma = alpha_bar[t].sqrt().view(-1, 1, 1, 1), (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
        student_v = unet(alpha * x0 + sigma * eps, t, text).sample
        return (student_v.float() - (alpha * eps - sigma * x0)).square().mean()

    averages = train("unet", unet, loss, budget, run)
    unet.load_state_dict(averages)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=tower, tokenizer=tokenizer, unet=unet.eval(), scheduler=noise_scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(dtype=getattr(torch, dtype)).save_pretrained(run.out / "teacher")
    return {"parameters": sum(p.numel() for p in unet.parameters()), "v_loss": last_loss(run, "unet")}
