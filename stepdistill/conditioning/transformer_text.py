"""Text conditioning of SD3, Flux, PixArt and Sana, through the pipelines' own `encode_prompt`.

Unconditional is the encoded empty prompt for all of them, as in their pipelines.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch

from stepdistill.conditioning.base import Cond
from stepdistill.conditioning.clip_text import device_of


class SD3Conditioner:
    """Token states of two CLIP text encoders and T5, and pooled text (Esser et al. 2024, section 4)."""

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Cond:
        """text (B, S, D), pooled (B, P)."""
        text, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, device=device_of(self.pipeline.text_encoder), do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def unconditional(self, n: int = 1, *, size: tuple[int, int] | None = None) -> Cond:
        """The encoded "", n times."""
        return self.encode([""] * n, size=size)


class FluxConditioner(SD3Conditioner):
    """Token states of T5, and CLIP's pooled text."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Cond:
        """text (B, S, D), pooled (B, P)."""
        text, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=device_of(self.pipeline.text_encoder))
        return {"text": text, "pooled": pooled}


class MaskedTextConditioner:
    """Token states of T5 (PixArt) or Gemma (Sana), and their attention mask.

    PixArt-Alpha at 1024 pixels is also conditioned on the image's size and aspect ratio. Sana's instruction to the
    language model is its pipeline's default; the empty prompt is encoded without it, as in the pipeline.
    """

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline
        asked = inspect.signature(type(pipeline).__call__).parameters.get("complex_human_instruction")
        self.instruction = {} if asked is None else {"complex_human_instruction": asked.default}

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], size: tuple[int, int] | None, instruction: dict) -> Cond:
        device = device_of(self.pipeline.text_encoder)
        text, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=device, **instruction
        )
        cond = {"text": text, "text_mask": mask}
        if getattr(self.pipeline.transformer, "use_additional_conditions", False):
            own = self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor
            height, width = size or (own, own)
            cond["resolution"] = torch.tensor([[height, width]], dtype=torch.float32, device=device)
            cond["aspect_ratio"] = torch.tensor([[height / width]], dtype=torch.float32, device=device)
            for name in ("resolution", "aspect_ratio"):
                cond[name] = cond[name].expand(len(prompts), -1)
        return cond

    def encode(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Cond:
        """text (B, S, D), text_mask (B, S); if the network needs them, resolution (B, 2) and aspect_ratio (B, 1)."""
        return self._encode(prompts, size, self.instruction)

    def unconditional(self, n: int = 1, *, size: tuple[int, int] | None = None) -> Cond:
        """The encoded "", n times."""
        return self._encode([""] * n, size, {})
