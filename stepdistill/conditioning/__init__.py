"""Conditions: a denoiser's inputs besides x_t and t, and how prompts are turned into them."""

from __future__ import annotations

from stepdistill.conditioning.base import Cond, Conditioner, expand, take, to

__all__ = ["Cond", "Conditioner", "expand", "from_pipeline", "take", "to"]


def from_pipeline(pipeline) -> Conditioner:
    """Returns the conditioner of a diffusers pipeline: text for its family; classes or nothing for a pixel model.

    Raises:
        InputError: an unsupported pipeline class.
    """
    from stepdistill.conditioning.clip_text import StableDiffusionConditioner, StableDiffusionXLConditioner
    from stepdistill.conditioning.labels import LabelConditioner
    from stepdistill.conditioning.transformer_text import FluxConditioner, MaskedTextConditioner, SD3Conditioner
    from stepdistill.errors import InputError

    makers = {
        "StableDiffusionPipeline": StableDiffusionConditioner,
        "StableDiffusionXLPipeline": StableDiffusionXLConditioner,
        "DDPMPipeline": LabelConditioner.of,
        "DDIMPipeline": LabelConditioner.of,
        "StableDiffusion3Pipeline": SD3Conditioner,
        "FluxPipeline": FluxConditioner,
        "PixArtAlphaPipeline": MaskedTextConditioner,
        "PixArtSigmaPipeline": MaskedTextConditioner,
        "SanaPipeline": MaskedTextConditioner,
    }
    name = type(pipeline).__name__
    if name not in makers:
        raise InputError(f"conditioning: got {name}; allowed: {', '.join(makers)}; give a pipeline of one of these")
    return makers[name](pipeline)
