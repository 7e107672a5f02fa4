"""Pipeline classes supported as teachers: which component is the network, and which denoiser wraps it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stepdistill.denoiser.base import Denoiser
from stepdistill.denoiser.pixel import PixelDenoiser
from stepdistill.denoiser.transformers import FluxDenoiser, PixArtDenoiser, SanaDenoiser, SD3Denoiser
from stepdistill.denoiser.unet import UNetDenoiser
from stepdistill.errors import InputError
from stepdistill.prediction import Kind
from stepdistill.schedules import AlphaBar, RectifiedFlow, Schedule
from stepdistill.timegrid import Grid

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True)
class Family:
    """A pipeline class.

    Attributes:
        backbone: the name of the network among the pipeline's components.
        denoiser: its wrapper, called as denoiser(backbone, schedule, kind).
        text: the components that `text=False` leaves out.
        flow_spacing: the time spacing that the pipeline requests from a flow-matching scheduler.
    """

    backbone: str
    denoiser: Callable[[Any, Schedule, Kind], Denoiser]
    text: tuple[str, ...] = ()
    flow_spacing: str = "linspace"


CLIP = ("text_encoder", "tokenizer")
TWO = (*CLIP, "text_encoder_2", "tokenizer_2")
THREE = (*TWO, "text_encoder_3", "tokenizer_3")

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family("unet", UNetDenoiser, CLIP),
    "StableDiffusionXLPipeline": Family("unet", UNetDenoiser, TWO),
    "DDPMPipeline": Family("unet", PixelDenoiser),
    "DDIMPipeline": Family("unet", PixelDenoiser),
    "StableDiffusion3Pipeline": Family("transformer", SD3Denoiser, THREE),
    "FluxPipeline": Family("transformer", FluxDenoiser, TWO, "trailing"),
    "PixArtAlphaPipeline": Family("transformer", PixArtDenoiser, CLIP),
    "PixArtSigmaPipeline": Family("transformer", PixArtDenoiser, CLIP),
    "SanaPipeline": Family("transformer", SanaDenoiser, CLIP),
}


def family_of(pipeline) -> Family:
    """Returns the family of a loaded pipeline, or of a class name.

    Raises:
        InputError: an unsupported class.
    """
    name = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
    if name not in FAMILIES:
        raise InputError(f"pipeline class: got {name}; allowed: {', '.join(FAMILIES)}; give one of these")
    return FAMILIES[name]


def is_flow(scheduler) -> bool:
    """Whether a diffusers scheduler follows the straight paths of a rectified flow."""
    return flows(type(scheduler).__name__, scheduler.config)


def flows(kind: str, config: Mapping[str, Any]) -> bool:
    """`is_flow`, from a scheduler's class name and configuration."""
    return kind.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))


def takes_sigmas(pipeline, scheduler) -> bool:
    """Whether a pipeline and its scheduler accept the noise levels to step at, as `sigmas`."""
    takers = (type(pipeline).__call__, scheduler.set_timesteps)
    return all("sigmas" in inspect.signature(taker).parameters for taker in takers)


def needs_sigmas(pipeline, scheduler) -> bool:
    """Whether a pipeline must be passed even sigmas: its default ends at 1/1000, which wastes a step (SD3, Sana)."""
    return takes_sigmas(pipeline, scheduler) and family_of(pipeline).flow_spacing == "linspace"


def even_sigmas(steps: int) -> list[float]:
    """Returns evenly spaced sigmas from 1 down, before any resolution shift, which the scheduler applies."""
    return [1 - i / steps for i in range(steps)]


def process_of(scheduler, path: str) -> tuple[Schedule, Kind]:
    """Derives the process a network was trained on, and its prediction type, from its scheduler.

    Raises:
        InputError: an unsupported prediction_type, or EDM's process, for which no student can be exported.
    """
    if is_flow(scheduler):
        return RectifiedFlow(), "flow"
    if (name := type(scheduler).__name__).startswith("EDM"):
        raise InputError(
            f"scheduler: got {name} in {path}, whose network was trained on EDM's process; allowed: teachers on "
            "discrete betas (DDIM, DDPM, Euler, ...) or of flow matching; take another teacher"
        )
    predicted = scheduler.config.get("prediction_type", "epsilon")
    if predicted not in KINDS:
        raise InputError(
            f"prediction_type: got {predicted!r} in {path}; allowed: {', '.join(KINDS)}; fix its scheduler_config.json"
        )
    return AlphaBar.from_scheduler(scheduler), KINDS[predicted]


def grid_of(pipeline, denoiser: Denoiser) -> Grid:
    """Returns the time grid of a few-step student's pipeline: a flow's spacing and resolution shift; else the default.

    With `use_dynamic_shifting` log(shift) is linear in the number of patches (Flux).
    """
    scheduler = pipeline.scheduler
    if not is_flow(scheduler):
        return Grid()
    config = scheduler.config
    shift = config.get("flow_shift", config.get("shift")) or 1.0
    if config.get("use_dynamic_shifting"):
        _, height, width = denoiser.sample_shape
        patches = (height // denoiser.patch) * (width // denoiser.patch)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        shift = math.exp(low + (high - low) * (patches - few) / (many - few))
    return Grid(family_of(pipeline).flow_spacing, shift)


def drawn_size(pipeline) -> int | None:
    """Returns the default image size of a loaded pipeline, as `picture_size` does, also of Flux's, whose network states
    none; None if nothing does."""
    if (own := getattr(pipeline, "default_sample_size", None)) is not None:
        return own * pipeline.vae_scale_factor
    return side_of(*(getattr(getattr(pipeline, part, None), "config", {}) for part in ("unet", "transformer", "vae")))


def side_of(unet: Mapping, transformer: Mapping, vae: Mapping) -> int | None:
    """Returns the image size, a side in pixels, that network configurations imply; None if they state none."""
    sides = [network.get("sample_size") for network in (unet, transformer)]
    side = next((side for side in sides if isinstance(side, int)), None)
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")  # the latter is Sana's
    return side and side * 2 ** (len(blocks) - 1 if blocks else 0)
