"""Images with classes: CIFAR-10, a folder with a subfolder for each class, or the embedded set by its attributes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepdistill.baselines.base import check_unused
from stepdistill.data.sources import PICTURES, Picture, fitted, open_picture
from stepdistill.draws import Draws
from stepdistill.errors import InputError

PAD = 4  # pixels; the largest shift of a training image, each way


@dataclass(frozen=True)
class Labelled:
    """N images and their classes.

    Attributes:
        pixels: (N, 3, S, S) uint8. labels: (N,) int64. classes: their names.
        flip: whether mirroring an image keeps its class.
    """

    pixels: Tensor
    labels: Tensor
    classes: Sequence[str]
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """Returns images and labels at these indices; `view` augments them, on the device."""
        return {"pixels": self.pixels[indices], "labels": self.labels[indices]}


def normalise(pixels: Tensor) -> Tensor:
    """Maps (B, 3, S, S) uint8 to [-2, 2], about unit variance."""
    return pixels.float() / 63.75 - 2


def view(pixels: Tensor, draws: Draws, flip: bool) -> Tensor:
    """Augments each image as in He et al. (2016): shifted by up to 4 pixels, and mirrored or not.

    Args:
        pixels: (B, 3, S, S) uint8. Edges are replicated.
    """
    side = pixels.shape[-1]
    padded = torch.nn.functional.pad(normalise(pixels), (PAD,) * 4, mode="replicate")
    places = torch.arange(side, device=pixels.device)
    rows = draws.integers(2 * PAD + 1)[:, None] + places
    columns = draws.integers(2 * PAD + 1)[:, None] + places
    if flip:
        columns = torch.where(draws.uniform()[:, None] < 0.5, columns.flip(1), columns)
    batch = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def open_labelled(
    spec: str, split: str, *, label: Sequence[str], limit: int | None, test: Path | None = None, seed: int = 0,
    resolution: int | None = None,
) -> Labelled:  # fmt: skip
    """Opens the images of a split.

    Args:
        spec: "avatars"; "cifar10" (through torchvision, downloaded to data/); or a folder whose subfolders are classes.
        split: train or test. label: attributes of the embedded set whose combination is the class.
        limit: images at most, drawn with `seed`, since a folder's are sorted by class.
        test: for a folder, the folder of its test images; by default `<folder>/test`, beside `<folder>/train`.
        resolution: side in pixels that images are resized and cropped to; None if all are squares of one size.

    Raises:
        InputError: the data do not exist, or all images are of one class.
    """
    if spec in ("avatars", "cifar10"):
        check_unused("--test", test, f"--data {spec}")
    if spec == "avatars":
        found = _avatars(split, label, resolution)
    elif spec == "cifar10":
        found = _cifar10(split, resolution)
    else:
        found = _folder(_split_of(Path(spec), split, test), resolution)
    if limit is not None and limit < len(found):
        drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:limit]
        found = Labelled(found.pixels[drawn], found.labels[drawn], found.classes, found.flip)
    if (kinds := len(found.labels.unique())) < 2:
        raise InputError(f"--data: got {len(found)} pictures of {kinds} class in {spec}; allowed: two classes or more")
    return found


def _squares(pictures: Iterable[Picture], side: int | None, where: str) -> Tensor:
    """(N, 3, S, S) uint8.

    Raises:
        InputError: no side is given, and the images are no squares of one size.
    """
    found = [np.asarray(picture) if side is None else fitted(picture, (side, side)) for picture in pictures]
    if len(shapes := {p.shape[:2] for p in found}) > 1 or len(set(found[0].shape[:2])) > 1:
        got = f"{len(shapes)} shapes" if len(shapes) > 1 else "{} x {} pixels".format(*next(iter(shapes)))
        raise InputError(f"--data: got pictures of {got} in {where}; allowed: squares of one size; give --resolution")
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def _avatars(split: str, label: Sequence[str], resolution: int | None) -> Labelled:
    from stepdistill.data import avatars

    data = avatars.load(split)
    unknown = [name for name in label if name not in data.attributes[0]]
    if unknown or not label:
        got = ", ".join(unknown) or "none"
        raise InputError(f"--label: got {got}; allowed: one or more of {', '.join(data.attributes[0])}")
    class_names = [" / ".join(row[name] for name in label) for row in data.attributes]
    classes = sorted({" / ".join(row[name] for name in label) for row in avatars.load("train").attributes})
    places = {name: i for i, name in enumerate(classes)}
    if unseen := set(class_names) - set(places):
        raise InputError(
            f"--label: got {len(label)} attributes, of which the test pictures have {len(unseen)} combinations that no "
            "training picture has; allowed: fewer attributes; drop one"
        )
    flip = not any(word in name for name in label for word in ("left", "right", "taller"))
    labels = torch.tensor([places[name] for name in class_names])
    return Labelled(_squares(data.images, resolution, "avatars"), labels, classes, flip)


def _cifar10(split: str, resolution: int | None) -> Labelled:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10("data", train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(
            f"--data: got cifar10, which could not be downloaded ({reason}); allowed: a network, CIFAR-10 in data/, a "
            "folder of folders, or avatars"
        ) from error
    pixels = _squares(data.data, resolution, "cifar10")
    return Labelled(pixels, torch.tensor(data.targets), data.classes, flip=True)


def _split_of(folder: Path, split: str, test: Path | None) -> Path:
    both = (folder / "train").is_dir()
    if split == "train":
        return folder / "train" if both else folder
    if test is None and not both:
        raise InputError(f"--test: got none for {folder}; allowed: a folder of test pictures; or {folder}/train, /test")
    return test or folder / "test"


def _folder(folder: Path, resolution: int | None) -> Labelled:
    if not folder.is_dir():
        raise InputError(f"--data: got {folder}, which is no folder; allowed: avatars, cifar10, or a folder of folders")
    files = sorted(f for f in folder.glob("*/*") if f.suffix.lower() in PICTURES)
    classes = sorted({f.parent.name for f in files})
    if not files:
        raise InputError(f"--data: got {folder}, without pictures; allowed: a folder for each class, pictures in it")
    pixels = _squares((open_picture(f, str(f)) for f in files), resolution, str(folder))
    return Labelled(pixels, torch.tensor([classes.index(f.parent.name) for f in files]), classes, flip=True)
