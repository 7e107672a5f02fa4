"""Image features for distances between sets of images: one extractor per name, its weights pinned by hash.

    extractor = load_extractor("efficientnet_lite2")
    extractor(images)      # uint8 (B, 3, H, W) -> (B, 1280) float32

A distance is reported under its extractor's title: only Inception's is FID; FD-EfficientNet-Lite2 is not.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.evaluation.parts import MANY, Parts, in_parts
from stepdistill.evaluation.precision import full_float32
from stepdistill.evaluation.resize import check_images, check_resize, resize
from stepdistill.files import sha256
from stepdistill.methods.feature_networks import LITE2_SHA256, FeatureNetwork, load_feature_network, load_lite2

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"
INCEPTION_PLACE = "STEPDISTILL_INCEPTION"  # environment variable: a weights file to use instead of the published one
STEM = 7  # Inception's layers before its first mixed block


@dataclass(frozen=True)
class Extractor:
    """A frozen network that maps images to features.

    Attributes:
        name: its key in EXTRACTORS. title: the name that figures are reported under.
        net: (B, 3, size, size) float32 in [0, 255] -> (B, dim).
        dim: feature dimension. size: input size in pixels. resize: how images are brought to that size.
        weights: hash of the weights; cached statistics are keyed by it.
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
        """Everything that determines the features, in one line: weights, resize and size."""
        return f"{self.name}:{self.weights}:{self.resize}@{self.size}"

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.net.parameters()).device

    @torch.inference_mode()
    @full_float32()
    def __call__(self, images: Tensor) -> Tensor:
        """Computes features (B, dim) float32 of images (B, 3, H, W) uint8, on a GPU without TF32."""
        return in_parts(self._seen, check_images(images).to(self.device), MANY)

    def _seen(self, images: Tensor) -> Tensor:
        return self.net(resize(images, self.size, self.resize)).float()


class Scaled(nn.Module):
    """Applies the network to (pixels - mean) / std. Pixels are in [0, 255]."""

    def __init__(self, net: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net((pixels - self.mean) / self.std)


def default_extractor() -> str:
    """Returns inception, FID's network, if its weights are present or can be downloaded; else efficientnet_lite2."""
    try:
        inception_file()
    except InputError:
        return "inception" if os.environ.get(INCEPTION_PLACE) else "efficientnet_lite2"  # a named file is not ignored
    return "inception"


def inception_file() -> Path:
    """Returns Inception's weights file: the one STEPDISTILL_INCEPTION names, else torch.hub's, downloaded if missing.

    Raises:
        InputError: the file does not exist or cannot be downloaded.
    """
    if named := os.environ.get(INCEPTION_PLACE):
        if not (file := Path(named).expanduser()).is_file():
            raise InputError(
                f"extractor inception: got {INCEPTION_PLACE}={named}, which is no file; allowed: {INCEPTION_FILE}, or "
                "weights of that shape"
            )
        return file
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), INCEPTION_SHA256_PREFIX, progress=False)
    except Exception as error:  # no torch-fidelity, no network, or a wrong hash: the fix is the same
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"extractor inception: its weights could not be loaded ({reason}); put {INCEPTION_FILE} into "
            f"{file.parent}, name it in {INCEPTION_PLACE}, or use efficientnet_lite2"
        ) from error
    return file


def _inception(size: int | None, resize: str | None) -> Extractor:
    """torch-fidelity's Inception without its internal resize. Other weights than FID's get a title of their own.

    Pixels are scaled as in the tool that the resize is named after: 2 x / 255 - 1 in pytorch-fid, (x - 128) / 128 in
    the others.
    """
    file = inception_file()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    digest = sha256(file)
    published = digest.startswith(INCEPTION_SHA256_PREFIX)
    if not published and not os.environ.get(INCEPTION_PLACE):
        raise InputError(f"extractor inception: {file} has SHA-256 {digest[:16]}; delete it and it is downloaded again")
    # torch-fidelity would unpickle the file, so it is given a copy that was loaded with weights_only.
    clean = io.BytesIO()
    try:
        torch.save(torch.load(file, map_location="cpu", weights_only=True), clean)
        clean.seek(0)
        whole = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], clean)
    except Exception as error:  # not a checkpoint, one that would run code, or other layers
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"extractor inception: got {file}, which holds no such weights ({reason})") from error
    layers = [_folded(layer) for name, layer in whole.named_children() if name != "fc"]
    mean, std = (127.5, 127.5) if resize == "pytorch-fid" else (128.0, 128.0)
    net = Scaled(nn.Sequential(Parts(*layers[:STEM]), *layers[STEM:], nn.Flatten()), mean, std)
    title = "Inception" if published else f"Inception-{digest[:8]}"
    return Extractor("inception", title, net, 2048, size or 299, resize or "torch-fidelity", digest)


def _folded(layer: nn.Module) -> nn.Module:
    """Folds each batch norm of a layer into the convolution before it, saving a pass over every feature map."""
    layer.eval()
    for block in layer.modules():
        if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            block.conv, block.bn = nn.utils.fusion.fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return layer


class _Pooled(nn.Module):
    """A feature network's pooled embedding of pixels in [0, 255]."""

    def __init__(self, net: FeatureNetwork) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels / 127.5 - 1)[1]


def _dinov2(size: int | None, resize: str | None) -> Extractor:
    net = load_feature_network("dinov2_vits14", size or 0)
    title = "DINOv2-ViT-S14"
    return Extractor("dinov2_vits14", title, _Pooled(net), net.width, net.size, resize or "bicubic", net.identity)


def _efficientnet_lite2(size: int | None, resize: str | None) -> Extractor:
    whole, title = load_lite2(LITE2_SHA256), "EfficientNet-Lite2"
    early = Parts(whole.conv_stem, whole.bn1, *whole.blocks[:2])
    layers = nn.Sequential(early, *whole.blocks[2:], whole.conv_head, whole.bn2, whole.global_pool)
    net = Scaled(layers, 127.0, 128.0)
    return Extractor("efficientnet_lite2", title, net, 1280, size or 260, resize or "bilinear", LITE2_SHA256)


# (size, resize) -> the extractor; None means the network's default
EXTRACTORS: dict[str, Callable[[int | None, str | None], Extractor]] = {
    "efficientnet_lite2": _efficientnet_lite2,
    "inception": _inception,
    "dinov2_vits14": _dinov2,
}


def load_extractor(
    name: str, *, size: int | None = None, resize: str | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Loads an extractor by name.

    Args:
        name: a key of EXTRACTORS; the weights of inception and dinov2_vits14 are downloaded if missing.
        size: input size in pixels; by default the network's own.
        resize: how images are brought to that size (see `resize.RESIZES`); by default the network's usual one.

    Raises:
        InputError: the name is unknown, or the weights are unavailable or do not have the pinned hash.
    """
    if name not in EXTRACTORS:
        raise InputError(f"extractor: got {name!r}; allowed: {', '.join(EXTRACTORS)}")
    if resize is not None:
        check_resize(resize)
    extractor = EXTRACTORS[name](size, resize)
    extractor.net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return extractor
