"""Loads a diffusers pipeline, from a folder or the hub, as a teacher."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import embedded
from stepdistill.conditioning.base import Conditioner
from stepdistill.denoiser.base import Denoiser
from stepdistill.errors import InputError
from stepdistill.schedules import AlphaBar

KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "DDPMPipeline", "DDIMPipeline")


@dataclass
class Teacher:
    """A pipeline seen as a denoiser, a conditioner and an autoencoder. All share the pipeline's own modules.

    Attributes:
        denoiser: the network behind the one call signature.
        conditioner: prompts to conditions.
        source: the diffusers pipeline.
        path: where it was loaded from.
    """

    denoiser: Denoiser
    conditioner: Conditioner
    source: Any
    path: str

    @property
    def family(self) -> str:
        """The name of the pipeline's class."""
        return type(self.source).__name__

    @property
    def vae(self):
        """The autoencoder; None for a pixel model."""
        return getattr(self.source, "vae", None)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of what the denoiser works on."""
        return self.denoiser.sample_shape

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures the denoiser was made for."""
        factor = self.source.vae_scale_factor if self.vae is not None else 1
        return self.sample_shape[1] * factor, self.sample_shape[2] * factor

    def pipeline(self):
        """A plain diffusers pipeline around the same modules, with a scheduler of its own."""
        parts = dict(self.source.components)
        parts["scheduler"] = copy.deepcopy(parts["scheduler"])
        options = {"requires_safety_checker": False} if self.family == "StableDiffusionPipeline" else {}
        return type(self.source)(**parts, **options)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to scaled latents, the posterior's mean; a pixel model's are the pictures."""
        if self.vae is None:
            return images
        encoded = self.vae.encode(images.to(self.vae.dtype))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        return (latents.float() - self._shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to pictures (B, 3, H, W), about [-1, 1], float32."""
        if self.vae is None:
            return latents.float()
        scaled = latents.float() / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].float()

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def to(self, device: torch.device | str) -> Teacher:
        """Moves every module."""
        self.source.to(device)
        return self


def open_pipeline(path: str | Path, *, variant: str | None = None, revision: str | None = None, dtype=None):
    """The diffusers pipeline in a folder or on the hub; "avatars" is the embedded teacher.

    Raises:
        InputError: a folder that is no pipeline, or a hub id that cannot be reached or does not exist.
    """
    from diffusers import DiffusionPipeline

    path = str(embedded.path("teacher")) if str(path) == "avatars" else str(path)
    local = Path(path)
    if local.exists() and not (local / "model_index.json").is_file():
        hint = "a LoRA: pass lora= with its base" if list(local.glob("*lora*.safetensors")) else "no model_index.json"
        raise InputError(f"pipeline: got {path} ({hint}); allowed: a diffusers pipeline folder, a hub id, or avatars")
    if not local.exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise InputError(f"pipeline: got {path}, which does not exist; allowed: a pipeline folder, a hub id "
                         "(owner/name), or avatars")  # fmt: skip
    options = {"torch_dtype": dtype or torch.float32, "variant": variant, "use_safetensors": True}
    if not local.exists():
        options["revision"] = revision
    try:
        return DiffusionPipeline.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:160]
        fix = "check the folder" if local.exists() else "check the id, the network and `hf auth login`, or give a folder"
        raise InputError(f"pipeline: got {path}, which could not be loaded ({reason}); {fix}") from error


def as_teacher(pipeline, path: str) -> Teacher:
    """A loaded pipeline as a teacher.

    Raises:
        InputError: a pipeline class without a denoiser here.
    """
    family = type(pipeline).__name__
    if family not in SUPPORTED:
        raise InputError(f"pipeline class: got {family} in {path}; allowed: {', '.join(SUPPORTED)}")
    schedule = AlphaBar.from_scheduler(pipeline.scheduler)
    kind = KINDS[pipeline.scheduler.config.prediction_type]
    if family.startswith("StableDiffusion"):
        from stepdistill.conditioning import clip_text
        from stepdistill.denoiser.unet import UNetDenoiser

        conditioner = getattr(clip_text, family.replace("Pipeline", "Conditioner"))(pipeline)
        denoiser = UNetDenoiser(pipeline.unet, schedule, kind)
    else:
        from stepdistill.conditioning.labels import LabelConditioner
        from stepdistill.denoiser.pixel import PixelDenoiser

        conditioner = LabelConditioner(pipeline.unet.config.num_class_embeds or 0)
        denoiser = PixelDenoiser(pipeline.unet, schedule, kind)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return Teacher(denoiser, conditioner, pipeline, path)


def load_teacher(
    path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Teacher:
    """Loads a teacher.

    Args:
        path: a pipeline folder, a hub id, or "avatars", the embedded one.
        variant: of the weight files, as "fp16". revision: of the hub repository.
        dtype: of the weights; float32 where it is not given.

    Returns:
        The teacher, frozen and in eval mode.

    Raises:
        InputError: what is there is no pipeline, cannot be reached, or is of a class not supported.
    """
    pipeline = open_pipeline(path, variant=variant, revision=revision, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return as_teacher(pipeline, str(path)).to(device)
