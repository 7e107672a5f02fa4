"""Text conditioning of Stable Diffusion 1.x/2.x and SDXL, through the pipelines' own `encode_prompt`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepdistill.conditioning.base import Cond
from stepdistill.errors import InputError


def device_of(encoder) -> torch.device:
    """Returns the device of a text encoder; raises InputError if the pipeline was loaded without one."""
    if encoder is None:
        raise InputError(
            "text encoder: got a pipeline loaded without one; allowed: conditions from a cache; load the teacher with "
            "text=True"
        )
    return encoder.device


class StableDiffusionConditioner:
    """CLIP token states; unconditional is the encoded empty prompt (Rombach et al. 2022).

    The network uses only the tokens. CLIP's pooled text, the state of the end-of-text token (Radford et al. 2021,
    section 2.4), is for discriminators: a mean over tokens would mostly be a mean over padding.
    """

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Cond:
        """text (B, S, D), pooled (B, D)."""
        device = device_of(self.pipeline.text_encoder)
        text, _ = self.pipeline.encode_prompt(list(prompts), device, 1, do_classifier_free_guidance=False)
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            list(prompts), padding="max_length", max_length=text.shape[1], truncation=True, return_tensors="pt"
        ).input_ids
        end = (ids == tokenizer.eos_token_id).int().argmax(1)
        return {"text": text, "pooled": text[torch.arange(len(text)), end]}

    def unconditional(self, n: int = 1, *, size: tuple[int, int] | None = None) -> Cond:
        """The encoded "", n times."""
        return self.encode([""] * n, size=size)


class StableDiffusionXLConditioner:
    """Token states of both text encoders, pooled text and size conditioning (Podell et al. 2023, section 2.2).

    Unconditional is zeros if the pipeline sets `force_zeros_for_empty_prompt`, as SDXL was trained; else the encoded
    empty prompt.
    """

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Cond:
        """text (B, S, D), pooled (B, P), time_ids (B, 6) float32: original size, crop (0, 0) and target size. Both
        sizes are `size`; default: the pipeline's own."""
        device = device_of(self.pipeline.text_encoder_2)
        text, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        own = self.pipeline.unet.config.sample_size
        own = (own, own) if isinstance(own, int) else own
        size = size or tuple(side * self.pipeline.vae_scale_factor for side in own)
        time_ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=device)
        return {"text": text, "pooled": pooled, "time_ids": time_ids.expand(len(prompts), 6)}

    def unconditional(self, n: int = 1, *, size: tuple[int, int] | None = None) -> Cond:
        """Zeros, or the encoded "", n times; the same time_ids as a prompt's."""
        cond = self.encode([""] * n, size=size)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            cond |= {key: torch.zeros_like(cond[key]) for key in ("text", "pooled")}
        return cond
