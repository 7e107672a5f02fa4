"""Image features for distances between sets of pictures: one extractor a name, its weights pinned by hash.

    extractor = load_extractor("efficientnet_lite2")
    extractor(images)      # uint8 (B, 3, H, W) -> (B, 1280) float32

A distance is reported under its extractor's own title: FD-EfficientNet-Lite2 is not FID, and only Inception's is.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.evaluation.resize import check_images, resize
from stepdistill.files import sha256
from stepdistill.methods.feature_networks import LITE2_SHA256, load_lite2

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"


@dataclass(frozen=True)
class Extractor:
    """A frozen network that turns pictures into features.

    Attributes:
        name: the key it is asked for by. title: the name that figures are reported under.
        net: (B, 3, size, size) float32 in [0, 255] -> (B, dim).
        dim: length of a feature. size: pixels it works at, 0 where the network resizes by itself.
        resize: how pictures get there.
        weights: hash of the weights, which statistics are keyed by.
    """

    name: str
    title: str
    net: nn.Module
    dim: int
    size: int
    resize: str
    weights: str

    @property
    def identity(self) -> str:
        """One line that fixes every number that comes out: weights, resize and size."""
        return f"{self.name}:{self.weights}:{self.resize}@{self.size}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, dim) float32 of pictures (B, 3, H, W) uint8, on the network's device."""
        weight = next(self.net.parameters())
        images = check_images(images).to(weight.device)
        pixels = resize(images, self.size, self.resize) if self.size else images.float()
        return self.net(pixels).float()


class Scaled(nn.Module):
    """(pixels - mean) / std before the network, and only then the network. Pixels in [0, 255]."""

    def __init__(self, net: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net((pixels - self.mean) / self.std)


def _efficientnet_lite2() -> tuple[nn.Module, str]:
    return Scaled(load_lite2(LITE2_SHA256), 127.0, 128.0), LITE2_SHA256


class _Inception(nn.Module):
    """torch-fidelity's Inception, which wants uint8 and resizes inside, as TensorFlow 1 did."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels.round().to(torch.uint8))[0]


def best_to_be_had() -> str:
    """inception, which FID is made with, where its weights are here or can be fetched; else efficientnet_lite2."""
    try:
        _inception_file()
    except InputError:
        return "efficientnet_lite2"
    return "inception"


def _inception_file() -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), INCEPTION_SHA256_PREFIX, progress=False)
    except Exception as error:  # no torch-fidelity, no network, a wrong hash: all mean the same to the user
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"extractor inception: its weights could not be had ({reason}); put {INCEPTION_FILE} into {file.parent}, "
            "or use efficientnet_lite2"
        ) from error
    return file


def _inception() -> tuple[nn.Module, str]:
    file = _inception_file()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if not (digest := sha256(file)).startswith(INCEPTION_SHA256_PREFIX):
        raise InputError(f"extractor inception: {file} has SHA-256 {digest[:16]}; delete it and it is downloaded again")
    # torch-fidelity would unpickle the file; what it is given here has been through weights_only.
    clean = io.BytesIO()
    torch.save(torch.load(file, map_location="cpu", weights_only=True), clean)
    clean.seek(0)
    return _Inception(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], clean)), digest


# name: (title, dim, native size, builder). A size of 0 means the network resizes by itself.
EXTRACTORS: dict[str, tuple[str, int, int, Callable[[], tuple[nn.Module, str]]]] = {
    "efficientnet_lite2": ("EfficientNet-Lite2", 1280, 260, _efficientnet_lite2),
    "inception": ("Inception", 2048, 0, _inception),
}


def load_extractor(
    name: str, *, size: int | None = None, resize: str | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """An extractor by name.

    Args:
        name: efficientnet_lite2, or inception where its weights can be had.
        size: pixels to work at; the network's own where not given (260).
        resize: how pictures get there (see `resize.RESIZES`); bilinear where not given.

    Raises:
        InputError: an unknown name, weights that cannot be had, or whose hash is not the pinned one.
    """
    if name not in EXTRACTORS:
        raise InputError(f"extractor: got {name!r}; allowed: {', '.join(EXTRACTORS)}")
    title, dim, native, build = EXTRACTORS[name]
    if native == 0 and (size or resize):
        raise InputError(f"extractor {name}: it resizes by itself; leave size and resize out")
    net, weights = build()
    net.eval().requires_grad_(False).to(device)
    return Extractor(name, title, net, dim, size or native, resize or ("bilinear" if native else "inside"), weights)
