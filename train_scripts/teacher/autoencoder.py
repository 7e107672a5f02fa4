"""The autoencoder: 32x32 images to 16x16 latents and back; then its decoder again, to tolerate a sampler's errors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from teacher.loop import Budget, Figures, Run, images_of, to_unit, train
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.data import avatars
from stepdistill.errors import InputError


def build_vae(sizes: dict) -> nn.Module:
    """A small AutoencoderKL."""
    from diffusers import AutoencoderKL

    levels = len(sizes["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=avatars.SIZE, **sizes,
    )  # fmt: skip


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + 2 L2."""
    return (y.float() - x).abs().mean() + 2 * (y.float() - x).square().mean()


def shaken(z: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Adds noise to latents (B, C, h, w), of up to `noise` times their standard deviation, mostly less."""
    level = noise * torch.rand(len(z), 1, 1, 1, generator=generator).square()
    return z + (level * torch.randn(z.shape, generator=generator)).to(z.device) * z.std()


def run_vae(run: Run, sizes: dict, budget: Budget, kl_weight: float, noise: float, start: str | None) -> Figures:
    """Trains the autoencoder to reconstruct from noised latents, with a small KL term.

    Codes that survive noise lie apart, so a denoiser can tell them from each other; without it the autoencoder hides
    detail in small differences of its latents, which a small denoiser cannot generate. `start` is a pipeline folder
    whose autoencoder is trained further, instead of random weights.
    """
    vae = build_vae(sizes).to(run.device)
    if start:
        vae.load_state_dict(load_file(Path(start) / "vae" / "diffusion_pytorch_model.safetensors"))
    train_images = images_of("train", run.device)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(train_images), (budget.batch_size,), generator=generator)
        x = to_unit(train_images[index])
        posterior = vae.encode(x).latent_dist
        eps = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = vae.decode(shaken(posterior.mean + posterior.std * eps, noise, generator)).sample
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(y, x) + kl_weight * kl

    vae.load_state_dict(train("vae", vae, loss, budget, run))
    vae.eval()
    latents = latents_of(vae, train_images[:4000])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(run.out / "vae")
    return {"scaling_factor": vae.config.scaling_factor} | reconstruction_figures(vae, run)


def run_decoder(run: Run, budget: Budget, noise: float) -> Figures:
    """Trains the decoder to tolerate a sampler's small errors: latents with noise of up to `noise`, mostly less; the
    encoder is frozen."""
    vae = load_vae(run)
    images = images_of("train", run.device)
    latents = latents_of(vae, images)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    decoder.requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (budget.batch_size,), generator=generator)
        z = shaken(latents[index], noise, generator)
        return reconstruction_loss(vae.decode(z).sample, to_unit(images[index]))

    decoder.load_state_dict(train("decoder", decoder, loss, budget, run))
    vae.eval().save_pretrained(run.out / "vae")
    return reconstruction_figures(vae, run)


def load_vae(run: Run) -> nn.Module:
    """The autoencoder of the `vae` stage, or of the `decoder` stage once that is done."""
    from diffusers import AutoencoderKL

    if not (run.out / "vae").is_dir():
        raise InputError(f"{run.out / 'vae'}: not there; run the stage vae first")
    return AutoencoderKL.from_pretrained(run.out / "vae").to(run.device).eval().requires_grad_(False)


@torch.no_grad()
def latents_of(vae: nn.Module, images: Tensor) -> Tensor:
    """(N, C, h, w) posterior means of uint8 images."""
    batches = tqdm(images.split(250), "latents", dynamic_ncols=True)
    return torch.cat([vae.encode(to_unit(batch)).latent_dist.mean for batch in batches])


@torch.no_grad()
def reconstruction_figures(vae: nn.Module, run: Run) -> Figures:
    """PSNR in dB of 1,000 held-out images, from exact latents and from latents with noise of 0.1."""
    test = to_unit(images_of("test", run.device)[:1000])
    figures = {}
    for name, level in (("held_out_psnr_db", 0.0), ("held_out_psnr_db_at_noise_0.1", 0.1)):
        errors = []
        for batch in test.split(250):
            z = vae.encode(batch).latent_dist.mean
            z = z + level / vae.config.scaling_factor * torch.randn(z.shape).to(z.device)
            errors.append(((vae.decode(z).sample.clamp(-1, 1) - batch) / 2).square().mean())
        figures[name] = round(-10 * torch.stack(errors).mean().log10().item(), 2)
    return figures
