"""CLIP score: how well an image matches its prompt, by any open_clip model from the hub or a local folder.

    model = load_clip("ViT-B-32", pretrained="openai")    # or "avatars", "local-dir:FOLDER", "hf-hub:owner/name"
    clip_scores(model.images(images), model.texts(prompts))   # (B,) in 0..100

The score is 100 max(cos, 0) per image, then averaged (Hessel et al. 2021, with MLPerf's factor). torchmetrics clamps
the mean instead; the two differ if single images have a negative cosine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill import embedded
from stepdistill.errors import InputError
from stepdistill.evaluation.frame import Frame
from stepdistill.evaluation.precision import full_float32
from stepdistill.evaluation.resize import check_images

LOCAL = "local-dir:"


@dataclass(frozen=True)
class ClipModel:
    """A frozen image tower and text tower.

    Attributes:
        title: the name that scores are reported under.
        model: open_clip's. tokenizer: prompts -> ids. transform: open_clip's preprocessing, PIL image -> (3, H, W).
        size: (height, width) of the image tower's input. mean, std: its normalisation of pixels in [0, 1].
        prefix: prepended to each prompt, such as "A photo depicts ". scale: factor of the score.
        frame: applied to images before the tower's own transform, instead of the protocol's frame; None if the
            protocol's applies.
        folder: the model's folder, which may hold probes; None for a hub model.
        setup: hash of the image preprocessing, and of a local model's configuration.
    """

    title: str
    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    transform: Callable
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prefix: str = ""
    folder: Path | None = None
    scale: float = 100.0
    frame: Frame | None = None
    setup: str = ""

    @property
    def device(self) -> torch.device:
        """The towers' device."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    @full_float32()
    def images(self, images: Tensor) -> Tensor:
        """Computes unit-length embeddings (B, D) float32 of images (B, 3, H, W) uint8, on a GPU without TF32.

        Images of another size go through open_clip's own transform, one by one in threads: torchvision's resize of a
        batch differs from Pillow's by up to two of 255 levels.
        """
        if self.frame is not None:
            images = self.frame.batch(images)
        if tuple(check_images(images).shape[-2:]) == self.size:
            mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
            pixels = (images.to(self.device).float() / 255 - mean) / std
        else:
            from PIL import Image

            pictures = images.permute(0, 2, 3, 1).cpu().numpy()
            with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it resizes
                framed = pool.map(lambda picture: self.transform(Image.fromarray(picture)), pictures)
                pixels = torch.stack(list(framed)).to(self.device)
        return nn.functional.normalize(self.model.encode_image(pixels).float(), dim=-1)

    @torch.no_grad()
    @full_float32()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Computes unit-length embeddings (B, D) float32 of prompts, on a GPU without TF32."""
        ids = self.tokenizer([self.prefix + prompt for prompt in prompts]).to(self.device)
        return nn.functional.normalize(self.model.encode_text(ids).float(), dim=-1)


def clip_scores(images: Tensor, texts: Tensor, scale: float = 100.0) -> Tensor:
    """Computes scale max(cos, 0) of pairs of unit-length embeddings: (B, D), (B, D) -> (B,)."""
    return scale * (images * texts).sum(-1).clamp_min(0)


def load_clip(
    name: str, *, pretrained: str | None = None, prefix: str = "", device: torch.device | str = "cpu"
) -> ClipModel:
    """Loads an open_clip model.

    Args:
        name: "avatars" (the embedded scorer), "local-dir:FOLDER", "hf-hub:owner/name", or an open_clip name such as
            ViT-B-32, which needs `pretrained`, such as openai.

    Raises:
        InputError: the model is unknown, or its weights cannot be loaded.
    """
    folder = _folder(name)
    if folder is None and not name.startswith("hf-hub:"):
        _check_listed(name, pretrained)
    model, transform, tokenizer = _opened(name, pretrained, folder, device)
    visual = model.eval().requires_grad_(False).visual
    size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    mean, std = tuple(visual.image_mean), tuple(visual.image_std)
    title, setup = _title(name, pretrained, folder), _setup(visual, folder)
    return ClipModel(title, model, tokenizer, transform, tuple(size), mean, std, prefix, folder, setup=setup)


def _folder(name: str) -> Path | None:
    """Returns the folder of a local model; None for any other.

    Raises:
        InputError: it holds no open_clip model.
    """
    if name != "avatars" and not name.startswith(LOCAL):
        return None
    folder = embedded.path("scorer") if name == "avatars" else Path(name.removeprefix(LOCAL))
    if not (folder / "open_clip_config.json").is_file():
        raise InputError(
            f"CLIP model: got {folder}, which has no open_clip_config.json; allowed: a folder saved by open_clip"
        )
    return folder


def _check_listed(name: str, pretrained: str | None) -> None:
    """Raises InputError if open_clip has no architecture of this name, or there are no weights for it."""
    import open_clip

    if name not in open_clip.list_models():
        raise InputError(
            f"CLIP model: got {name!r}; allowed: avatars, local-dir:FOLDER, hf-hub:owner/name, or a name of "
            "open_clip.list_models(), as ViT-B-32"
        )
    if not pretrained:
        tags = ", ".join([*open_clip.list_pretrained_tags_by_model(name)[:4], "a file of weights"])
        raise InputError(f"CLIP model {name}: got no `pretrained`, so it would be random; allowed: {tags}")


def _opened(
    name: str, pretrained: str | None, folder: Path | None, device: torch.device | str
) -> tuple[nn.Module, Callable, Callable[[list[str]], Tensor]]:
    """Returns open_clip's model, its transform of images and its tokenizer.

    Raises:
        InputError: they cannot be loaded.
    """
    import open_clip

    source = f"{LOCAL}{folder}" if folder else name
    # OpenAI's weights were trained with QuickGELU, which open_clip's models of the same name do not use.
    quick = bool((open_clip.get_pretrained_cfg(name, pretrained or "") or {}).get("quick_gelu"))
    try:
        with _quiet():
            model, transform = open_clip.create_model_from_pretrained(
                source, pretrained=pretrained, device=device, force_quick_gelu=quick
            )
            return model, transform, open_clip.get_tokenizer(source)
    except Exception as error:  # the hub, files and configurations raise different types
        reason = " ".join(str(error).split())[:160]
        got = f"{name} with {pretrained}" if pretrained else name
        raise InputError(
            f"CLIP model: got {got}, which could not be loaded ({reason}); check the name, the network or the path"
        ) from error


def _title(name: str, pretrained: str | None, folder: Path | None) -> str:
    if name == "avatars":
        return "avatars-scorer"
    if folder is not None:
        return folder.name
    return f"{name}/{pretrained}" if pretrained else name


def _setup(visual: nn.Module, folder: Path | None) -> str:
    settings = [getattr(visual, "preprocess_cfg", None), folder and (folder / "open_clip_config.json").read_text()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _quiet():
    """Suppresses open_clip's logging, which would break into a progress bar; its errors are raised all the same."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
