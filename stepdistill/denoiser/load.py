"""Loads a diffusers pipeline, from a folder or the hub, as a teacher."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import embedded
from stepdistill.conditioning.base import Conditioner
from stepdistill.denoiser.autoencoder import whole
from stepdistill.denoiser.base import Denoiser
from stepdistill.denoiser.families import FAMILIES, family_of, grid_of, process_of
from stepdistill.denoiser.parts import check_folder, check_words
from stepdistill.errors import InputError
from stepdistill.quiet import collected, newly_initialised


@dataclass
class Teacher:
    """A pipeline as a denoiser, a conditioner and an autoencoder. All share the pipeline's own modules.

    Attributes:
        denoiser: the network, wrapped in the common call signature.
        conditioner: maps prompts to conditions.
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
    def part(self) -> str:
        """The name of the network among the pipeline's components: unet or transformer."""
        return family_of(self.source).backbone

    @property
    def vae(self):
        """The autoencoder; None for a pixel model."""
        return getattr(self.source, "vae", None)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the denoiser's samples."""
        return self.denoiser.sample_shape

    @property
    def factor(self) -> int:
        """Pixels per latent along one side; 1 for a pixel model."""
        return self.source.vae_scale_factor if self.vae is not None else 1

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the denoiser works at."""
        return self.sample_shape[1] * self.factor, self.sample_shape[2] * self.factor

    def pipeline(self):
        """Returns a plain diffusers pipeline with the same modules and a copy of the scheduler."""
        parts = dict(self.source.components)
        parts["scheduler"] = copy.deepcopy(parts["scheduler"])
        options = {"requires_safety_checker": False} if self.family == "StableDiffusionPipeline" else {}
        return type(self.source)(**parts, **options)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes images (B, 3, H, W) in [-1, 1] to scaled latents, the posterior's mean, float32; a pixel model
        returns the images."""
        if self.vae is None:
            return images
        with whole(self.vae) as vae:
            encoded = vae.encode(images.to(vae.dtype))
            latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded[0]
        gain, shift = self._affine(latents)
        return (latents.float() - shift) / gain

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents to images (B, 3, H, W), about [-1, 1], float32."""
        return self.paint(latents)

    def paint(self, latents: Tensor) -> Tensor:
        """`decode` with gradients to the latents; an autoencoder that overflows in half precision must be float32."""
        if self.vae is None:
            return latents.float()
        gain, shift = self._affine(latents)
        with whole(self.vae) as vae:
            return vae.decode((latents.float() * gain + shift).to(vae.dtype), return_dict=False)[0].float()

    def _affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Returns gain and shift in: the autoencoder's own latents = gain * scaled latents + shift."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return 1 / config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
        mean, std = (torch.tensor(v, dtype=torch.float32, device=like.device).view(1, -1, 1, 1) for v in (mean, std))
        return std / config.scaling_factor, mean

    def resize(self, size: tuple[int, int]) -> Teacher:
        """Sets the (height, width) in pixels of the images to work at; returns the teacher."""
        height, width = (side // self.factor for side in size)
        self.denoiser.sample_shape = (self.sample_shape[0], height, width)
        self.denoiser.grid = grid_of(self.source, self.denoiser)
        return self

    def to(self, device: torch.device | str) -> Teacher:
        """Moves every module; returns the teacher."""
        self.source.to(device)
        return self

    @contextmanager
    def vae_on(self, device: torch.device | str) -> Iterator[None]:
        """Context in which the autoencoder, if there is one, is on a device; afterwards it is moved back: to the CPU,
        where it takes no device memory, if training does not need it."""
        if self.vae is None:
            yield
            return
        home = next(self.vae.parameters()).device
        try:
            self.vae.to(device)
            yield
        finally:
            self.vae.to(home)


def move_coders(teacher: Teacher, device: torch.device | str) -> None:
    """Moves text encoders and autoencoder, all modules of a teacher except the denoiser, to a device."""
    for part in teacher.source.components.values():
        if isinstance(part, torch.nn.Module) and part is not teacher.denoiser.backbone:
            part.to(device)


def find(path: str | Path) -> str:
    """Resolves a pipeline folder or hub id for diffusers; "avatars" and "avatars-flow" are the embedded teachers.

    Raises:
        InputError: a folder that holds no pipeline, or something that is neither a folder nor an owner/name.
    """
    path = str(path)
    if path in embedded.TEACHERS:
        return str(embedded.path(embedded.TEACHERS[path]))
    local = Path(path).expanduser()
    try:
        there, whole_one = local.exists(), (local / "model_index.json").is_file()
    except OSError as error:
        raise InputError(f"pipeline: got {path} ({error.strerror}); allowed: a folder that can be read") from error
    allowed = "allowed: a diffusers pipeline folder, a hub id (owner/name), " + " or ".join(embedded.TEACHERS)
    if there:
        if whole_one:
            return str(local)
        lora = local.is_dir() and (any(local.glob("*lora*.safetensors")) or any(local.glob("adapter_*")))
        hint = "a LoRA: give its base here and the LoRA as lora=" if lora else "no model_index.json"
        raise InputError(f"pipeline: got {path} ({hint}); {allowed}")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise InputError(f"pipeline: got {path}, which does not exist; {allowed}")
    return path


def _cannot_load(path: str, error: Exception) -> InputError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    hub = "check the id, the network and `hf auth login`, or give a folder"
    fix = "check the folder" if Path(path).exists() else hub
    return InputError(f"pipeline: got {path}, which could not be loaded ({reason[:160]}); {fix}")


def _reachable(hub_id: str, revision: str | None) -> bool:
    """Whether the hub answers for this id; False without a network, in which case a cached copy may suffice."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError

    try:
        model_info(hub_id, revision=revision, timeout=10)
    except HfHubHTTPError:
        raise
    except Exception:  # offline mode, or any network error
        return False
    return True


def class_of(path: str | Path, revision: str | None = None) -> str:
    """Returns the name of the pipeline class without loading any weights.

    Raises:
        InputError: see `find`; or the index cannot be read.
    """
    from diffusers import DiffusionPipeline

    path = find(path)
    reachable = True
    try:
        if Path(path).exists():
            index = json.loads((Path(path) / "model_index.json").read_text())
        else:
            with collected():
                reachable = _reachable(path, revision)  # checked once: `load_config` would retry for half a minute
                index = DiffusionPipeline.load_config(path, revision=revision, local_files_only=not reachable)
        return str(index["_class_name"])
    except Exception as error:
        offline = OSError("the hub cannot be reached and there is no cached copy")
        raise _cannot_load(path, error if reachable else offline) from error


def open_pipeline(
    path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    text: bool = True,
):
    """Loads a diffusers pipeline from a folder or the hub, from safetensors only; "avatars" is an embedded teacher.

    Args:
        dtype: of the weights, or a dictionary of dtypes by component and for the "default"; float32 by default.
        text: False leaves the text encoders out, for conditions from a cache.

    Raises:
        InputError: a folder that holds no pipeline, is broken or lacks a component, or a hub id that cannot be reached
            or does not exist.
    """
    from diffusers import DiffusionPipeline

    path = find(path)
    options: dict[str, Any] = {"torch_dtype": dtype or torch.float32, "variant": variant, "use_safetensors": True}
    if not Path(path).exists():
        options["revision"] = revision
    family = None if text else FAMILIES.get(class_of(path, revision))
    without = family.text if family else ()
    try:
        if Path(path).exists():
            check_folder(Path(path), without)
        with collected() as messages:
            pipeline = DiffusionPipeline.from_pretrained(path, **options, **dict.fromkeys(without))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # diffusers, transformers, safetensors and the hub raise a dozen types
        raise _cannot_load(path, error) from error
    if untrained := newly_initialised(messages):
        raise InputError(
            f"pipeline: got {path}, whose files lack weights of {', '.join(untrained)}; allowed: all of them; copy or "
            "fetch it again"
        )
    check_words(pipeline, path)
    return pipeline


def as_teacher(pipeline, path: str) -> Teacher:
    """Wraps a loaded pipeline as a teacher.

    Raises:
        InputError: an unsupported pipeline class or prediction_type.
    """
    from stepdistill.conditioning import from_pipeline

    family = family_of(pipeline)
    schedule, kind = process_of(pipeline.scheduler, path)
    denoiser = family.denoiser(getattr(pipeline, family.backbone), schedule, kind)
    denoiser.grid = grid_of(pipeline, denoiser)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return Teacher(denoiser, from_pipeline(pipeline), pipeline, path)


def load_teacher(
    path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    backbone_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    text: bool = True,
) -> Teacher:
    """Loads a teacher.

    Args:
        path: a pipeline folder, a hub id, or an embedded teacher: "avatars" or "avatars-flow".
        variant: of the weight files, such as "fp16". revision: of the hub repository.
        dtype: of the weights, float32 by default. backbone_dtype: of the denoiser's weights, if different.
        text: False leaves the text encoders out; the conditioner then cannot encode.

    Returns:
        The teacher, frozen and in eval mode.

    Raises:
        InputError: the path holds no pipeline, cannot be reached, or is of an unsupported class.
    """
    family, types = family_of(class_of(path, revision)), dtype
    if backbone_dtype is not None:
        types = {family.backbone: backbone_dtype, "default": dtype or torch.float32}
    pipeline = open_pipeline(path, variant=variant, revision=revision, dtype=types, text=text)
    pipeline.set_progress_bar_config(disable=True)
    return as_teacher(pipeline, str(path)).to(device)
