"""Classifiers by name: CIFAR's residual networks, torchvision's with a stem for small images, and all of timm's.

resnet8, resnet20, resnet32, resnet56, ...    He et al. 2016, section 4.2: 6n + 2 layers of 16, 32 and 64 channels
resnet18, resnet34, resnet50, ...             torchvision's; for images up to 64 pixels with a 3x3 stem and no pooling
timm:NAME                                     as timm builds it
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from stepdistill.errors import InputError
from stepdistill.files import replacing

SMALL = 64  # pixels; up to this size the usual stem, which downsamples by 4, would leave too few


class CifarResNet(nn.Module):
    """6n + 2 layers: three stages of n blocks; shortcuts are padded with zeros where the width doubles (option A).

    Args:
        depth: 6n + 2. classes: of the logits.
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        blocks, width = [], 16
        for out in (16, 32, 64):
            for i in range(n):
                stride = 2 if out > width and i == 0 else 1
                shortcut = None if out == width else PaddedShortcut(out - width)
                blocks.append(BasicBlock(width, out, stride, shortcut))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) to logits (B, classes)."""
        return self.head(self.blocks(self.stem(pixels)).mean((2, 3)))


class PaddedShortcut(nn.Module):
    """Subsamples by 2 and appends channels of zeros; has no parameters."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))


def build(name: str, classes: int, side: int, *, seed: int) -> nn.Module:
    """Builds a classifier with random weights.

    Args:
        name: see above. classes: of its logits. side: of the images, in pixels. seed: of the weights.

    Raises:
        InputError: there is no such network, it does not classify images of this size, or it gives more than logits
            in training.
    """
    network = _named(name, classes, side, seed)
    try:
        with torch.no_grad():
            answer = network.eval()(torch.zeros(1, 3, side, side))
            trained = copy.deepcopy(network).train()(torch.zeros(2, 3, side, side))  # would move running statistics
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(
            f"network: got {name} for images of {side} pixels ({reason}); allowed: one that takes them; try resnet20"
        ) from error
    if [getattr(given, "shape", None) for given in (answer, trained)] != [(1, classes), (2, classes)]:
        when = "" if getattr(answer, "shape", None) != (1, classes) else " in training"
        raise InputError(
            f"network: got {name}, which gives no logits (B, {classes}){when}; allowed: a classifier without auxiliary "
            "outputs; try resnet20"
        )
    return network.train()


def save(network: nn.Module, target: Path, name: str, classes: Sequence[str], side: int) -> None:
    """Saves a classifier: model.safetensors, and in config.json what it was built from."""
    with replacing(target) as folder:
        save_model(network, str(folder / "model.safetensors"))
        config = {"network": name, "classes": list(classes), "resolution": side}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(folder: Path | str) -> nn.Module:
    """Loads what `save` saved, in evaluation mode. It takes images as `normalise` in data.py makes them."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    network = build(config["network"], len(config["classes"]), config["resolution"], seed=0)
    load_model(network, str(Path(folder) / "model.safetensors"))
    return network.eval()


def _named(name: str, classes: int, side: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    depth = re.fullmatch(r"resnet(\d+)", name)
    if depth and (int(depth[1]) - 2) % 6 == 0 and int(depth[1]) not in (18, 34, 50, 101, 152):
        return CifarResNet(int(depth[1]), classes)
    try:
        if name.startswith("timm:"):
            import timm

            return timm.create_model(name.removeprefix("timm:"), num_classes=classes)
        from torchvision.models import get_model

        network = get_model(name, num_classes=classes)
    except (ValueError, RuntimeError, TypeError, OSError) as error:  # OSError: a detector wants its backbone's weights
        raise InputError(
            f"network: got {name!r}; allowed: resnet8, resnet20, ... (6n + 2 layers), torchvision's names, timm:NAME"
        ) from error
    if side <= SMALL and depth:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network
