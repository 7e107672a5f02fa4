"""Images from a plain diffusers pipeline, each with its own noise, the same for every model and step count.

Image i of a run is generated with a generator seeded by (seed, i): its initial latents, and the noise that a scheduler
may add later, do not depend on the batch, the model, or what was generated before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from stepdistill.denoiser.autoencoder import whole
from stepdistill.denoiser.families import drawn_size, even_sigmas
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.evaluation.schedulers import has_spacing

# What encode_prompt returns, for pipelines whose prompts are encoded once for all step counts.
ENCODED = {
    "StableDiffusionPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "StableDiffusionXLPipeline": (
        "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    ),
}  # fmt: skip
EMBEDDINGS_LIMIT = 1 << 30  # bytes of prompt embeddings kept between step counts


@lru_cache(maxsize=16)
def accepted(kind: type) -> frozenset[str]:
    """The arguments that a pipeline class accepts in its call."""
    return frozenset(inspect.signature(kind.__call__).parameters)


def backbone(pipeline) -> torch.nn.Module:
    """Returns the network that is called at every step."""
    module = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    if module is None:
        raise InputError(
            f"pipeline: got {type(pipeline).__name__}, which has no unet or transformer; allowed: a diffusion pipeline"
        )
    return module


def is_guidance_conditioned(pipeline) -> bool:
    """Whether the backbone is guidance-conditioned (LCM's w, Flux-dev's scale) and never needs a second forward."""
    config = backbone(pipeline).config
    return config.get("time_cond_proj_dim") is not None or bool(config.get("guidance_embeds"))


def most_steps(pipeline) -> int | None:
    """Returns the size of the time grid that the scheduler picks its steps from (LCM's, TCD's); None if it has none."""
    return pipeline.scheduler.config.get("original_inference_steps")


def takes_guidance(pipeline) -> bool:
    """Whether a guidance scale changes what a pipeline generates.

    If it also has a true_cfg_scale (Flux), guidance_scale is an input of the network, or without effect (schnell).
    """
    known = accepted(type(pipeline))
    return "guidance_scale" in known and ("true_cfg_scale" not in known or is_guidance_conditioned(pipeline))


@lru_cache(maxsize=16)
def _settled(kind: type, device: torch.device) -> type:
    return type(kind.__name__, (kind,), {"_execution_device": device, "__module__": kind.__module__})


@contextmanager
def settled(pipeline, device: torch.device) -> Iterator[None]:
    """Context in which a pipeline takes `device` as its own; otherwise every call searches all its modules for it,
    which is a noticeable share of a small network's call."""
    kind = type(pipeline)
    pipeline.__class__ = _settled(kind, device)
    try:
        yield
    finally:
        pipeline.__class__ = kind


@dataclass(frozen=True)
class Sampler:
    """A pipeline and the arguments that do not change between calls.

    Attributes:
        pipeline: plain diffusers. guidance: scale, 1.0 means none. seed: the run's. even: pass evenly spaced `sigmas`.
        call: further arguments of the pipeline's call (see `models.call_of`). negative: the negative prompt, for
            pipelines that take one.
    """

    pipeline: Any
    guidance: float = 1.0
    seed: int = 0
    even: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    negative: str | None = None

    @cached_property
    def device(self) -> torch.device:
        """Where the pipeline runs, which does not change while it is sampled."""
        return self.pipeline._execution_device

    @property
    def spacing(self) -> str | None:
        """The scheduler's timestep_spacing; None if it has times of its own, or the call sets them."""
        scheduler = self.pipeline.scheduler
        if "timesteps" in self.call or not has_spacing(type(scheduler)):
            return None
        return scheduler.config.timestep_spacing

    @property
    def guided(self) -> bool:
        """Whether every step evaluates a second prompt."""
        return self.guidance > 1 and not is_guidance_conditioned(self.pipeline)

    @property
    def side(self) -> int | None:
        """Side of its images in pixels; None if the pipeline does not specify it."""
        return self.call.get("height") or drawn_size(self.pipeline)

    @property
    def takes_prompts(self) -> bool:
        """Whether the pipeline is text-to-image."""
        return "prompt" in accepted(type(self.pipeline))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Returns the call's arguments for the prompts: embeddings if they can be made once, else the prompts."""
        if not self.takes_prompts:
            return {}
        names = ENCODED.get(type(self.pipeline).__name__)
        if names is None:
            return {"prompt": list(prompts)}
        negative = {"negative_prompt": [self.negative] * len(prompts)} if self.guided and self.negative else {}
        encoded = self.pipeline.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self.guided,
            **negative,
        )
        return {name: value for name, value in zip(names, encoded, strict=True) if value is not None}

    @torch.no_grad()
    def __call__(self, condition: dict[str, Any], *, first: int, count: int, steps: int) -> Tensor:
        """Generates images number `first` to `first + count - 1`, uint8 (count, 3, H, W) on the CPU.

        Args:
            condition: from `encode`, or {"prompt": [...]}.

        Raises:
            InputError: the model returned NaN.
        """
        known = accepted(type(self.pipeline))
        options: dict[str, Any] = {"generator": Draws.at(self.seed, first, count).generators, "output_type": "pt"}
        options |= step_options(self.pipeline, steps, self.call)
        if "guidance_scale" in known:
            options["guidance_scale"] = self.guidance
        if self.negative and self.guided and "prompt" in condition and "negative_prompt" in known:
            options["negative_prompt"] = [self.negative] * count
        if "batch_size" in known:
            options["batch_size"] = count
        if self.even:
            options["sigmas"] = even_sigmas(steps)
        return to_uint8(self.pipeline(**condition, **options).images)


@dataclass(frozen=True)
class Drawn:
    """A generated batch.

    Attributes:
        pictures: (B, 3, H, W) uint8. evaluations: samples that went through the denoiser for it, including guidance's
            second half.
    """

    pictures: Tensor
    evaluations: int = 0


@dataclass(frozen=True)
class Series:
    """The batches of a model at all its step counts; prompts are encoded once for all of them.

    Attributes:
        sampler: generates. prompts: one per image; None if there are none. n: number of images. batch: batch size.
        each: consecutive images per prompt. offset: number of the first image, which determines its noise.
        encoded: the encoded prompts of each batch so far, by the batch's first image.
    """

    sampler: Sampler
    prompts: Sequence[str] | None
    n: int
    batch: int
    each: int = 1
    offset: int = 0
    encoded: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)

    def draw(self, steps: int, first: int, count: int) -> Drawn:
        """Generates images number `first` to `first + count - 1`.

        Raises:
            InputError: the model returned NaN.
        """
        condition, evaluations = self._condition(first, count), []
        hook = backbone(self.sampler.pipeline).register_forward_pre_hook(
            lambda _, args, kwargs: evaluations.append(evaluated(args, kwargs)), with_kwargs=True
        )
        try:
            with settled(self.sampler.pipeline, self.sampler.device):
                pictures = self.sampler(condition, first=self.offset + first, count=count, steps=steps)
        finally:
            hook.remove()
        return Drawn(pictures, sum(evaluations))

    def several(self, each: int, prompts: int | None = None) -> Series:
        """Returns a series of `each` images per prompt, for the first `prompts` or all prompts, with other noise."""
        asked = [prompt for prompt in self.prompts[:prompts] for _ in range(each)]
        return Series(self.sampler, asked, len(asked), self.batch, each, self.offset + self.n)

    def seeded(self, seed: int) -> Series:
        """Returns the same series with the noise of another seed; the encoded prompts are shared."""
        return replace(self, sampler=replace(self.sampler, seed=seed))

    def _condition(self, first: int, count: int) -> dict[str, Any]:
        if (kept := self.encoded.get(first)) is not None:
            return kept
        prompts = self.prompts
        condition = self.sampler.encode(prompts[first : first + count]) if prompts is not None else {}
        size = sum(v.nbytes for v in condition.values() if isinstance(v, Tensor))
        if size * -(-self.n // self.batch) <= EMBEDDINGS_LIMIT:
            self.encoded[first] = condition
        return condition


def evaluated(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Returns the batch size of a denoiser call."""
    return len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states")))


def step_options(pipeline, steps: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that set a pipeline's number of steps, and `call`.

    Images are generated at the requested size, not at the nearest of a list and resized, and from the unchanged prompt:
    PixArt rewrites it if Beautiful Soup is installed. SANA-Sprint has a default time for the second of two steps, and
    rejects it for other step counts.
    """
    known = accepted(type(pipeline))
    options = {"num_inference_steps": steps} | dict(call)
    options |= {name: False for name in ("use_resolution_binning", "clean_caption") if name in known}
    if "intermediate_timesteps" in known and steps != 2:
        options["intermediate_timesteps"] = None
    return options


def to_uint8(images: Any) -> Tensor:
    """Converts a pipeline's output in [0, 1], a tensor (B, 3, H, W) or an array (B, H, W, 3), to uint8 on the CPU.

    The result is contiguous, like images read from files: convolutions round differently in other memory layouts.

    Raises:
        InputError: a value is not finite.
    """
    images = images if isinstance(images, Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)
    images = images.float()
    if not torch.isfinite(images).all():
        raise InputError("pictures: got NaN from the model; try dtype=fp32 (or bf16), or look at its training")
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().contiguous()


@torch.no_grad()
def reconstruct(pipeline, images: Tensor) -> Tensor:
    """Encodes and decodes images with the pipeline's autoencoder: (B, 3, H, W) uint8 in and out."""
    with whole(pipeline.vae) as vae:
        pixels = (images.to(vae.device) / 127.5 - 1).to(vae.dtype)
        encoded = vae.encode(pixels)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        return to_uint8(vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5)
