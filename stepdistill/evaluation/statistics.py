"""Files of statistics of real images: this package's, which record their origin, and those of other tools.

    save_statistics(file, moments, origin)
    moments, origin = load_statistics(file)
    moments, origin = read_statistics("cifar10-32x32.npz", Origin(extractor.identity), dim=2048)

A .safetensors is written by this package and records its origin; it is rejected if the protocol needs another. An .npz
is what EDM, pytorch-fid, MLPerf and DMD2 write: `mu` (D,) and `sigma` (D, D), unbiased. It does not record the images,
the extractor or the resize: the protocol must, and rows mark such statistics as foreign.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation import arrays
from stepdistill.evaluation.frame import Frame
from stepdistill.evaluation.frechet import Moments

ENDINGS = (".npz", ".safetensors")
ROUNDING = 1e-5  # tolerance for asymmetry and negative eigenvalues from float32 sums, relative to the largest


@dataclass(frozen=True)
class Origin:
    """Everything that statistics depend on. None means unknown, or not required.

    Attributes:
        extractor: its identity: name, weights, resize and size. frame: how images were preprocessed.
        pictures: hash of the set. count: number of its images.
    """

    extractor: str
    frame: str | None = None
    pictures: str | None = None
    count: int | None = None

    def check(self, found: Origin, file: Path, fix: str) -> None:
        """Checks that the origin found in a file is the one required.

        Raises:
            InputError: it is not; `fix` says what to do.
        """
        for name, wanted in dataclasses.asdict(self).items():
            if wanted is not None and (got := getattr(found, name)) != wanted:
                raise InputError(f"statistics: got {file}, whose {name} is {got}; allowed: {wanted}; {fix}")


def framed(size: Frame | int | None) -> str:
    """Describes how images were preprocessed for the extractor."""
    if size is None:
        return "as they are"
    return f"{size.size} {size.fit} {size.filter}" if isinstance(size, Frame) else str(size)


def save_statistics(file: str | Path, moments: Moments, origin: Origin, dtype: torch.dtype = torch.float64) -> None:
    """Writes moments and their origin atomically. Only the lower triangle of the scatter is stored, in `dtype`."""
    rows, columns = torch.tril_indices(len(moments.mean), len(moments.mean))
    facts = dataclasses.asdict(dataclasses.replace(origin, count=moments.count))
    half = moments.scatter[rows, columns].to(dtype)
    arrays.save(file, {"mean": moments.mean, "scatter": half}, **{k: str(v) for k, v in facts.items() if v is not None})


def load_statistics(file: str | Path) -> tuple[Moments, Origin | None]:
    """Reads a file written by `save_statistics`; the origin is None if the file records none.

    Raises:
        InputError: the file is damaged, or something else.
    """
    tensors, facts = arrays.load(file)
    try:
        count, mean, half = int(facts["count"]), tensors["mean"].double(), tensors["scatter"].double()
        if count < 1 or mean.ndim != 1 or half.shape != (len(mean) * (len(mean) + 1) // 2,):
            raise ValueError(f"count {count}, mean {tuple(mean.shape)} and scatter {tuple(half.shape)} do not fit")
    except (KeyError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"statistics: got {file}, which holds none ({reason}); allowed: a file that stepdistill wrote; delete it"
        ) from error
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    rows, columns = torch.tril_indices(len(mean), len(mean))
    scatter[rows, columns] = half
    scatter[columns, rows] = half
    origin = None
    if "extractor" in facts:
        origin = Origin(facts["extractor"], facts.get("frame"), facts.get("pictures"), count)
    return Moments(count, mean, scatter), origin


def are_statistics(reference: str) -> bool:
    """Whether a reference's name is that of a statistics file."""
    return Path(reference).suffix in ENDINGS


def read_statistics(file: str | Path, wanted: Origin, dim: int) -> tuple[Moments, Origin | None]:
    """Reads the moments in a file that the user names.

    Args:
        wanted: the origin that the protocol needs. An .npz is assumed to be of its count, which affects only reports.
        dim: length of the extractor's features.

    Returns:
        The moments, and the origin that the file records, which is the one wanted; None if it records none.

    Raises:
        InputError: no such file, one that is damaged or needs pickle, statistics of something else or of features of
            another length, or moments that no set of images can have.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise InputError(f"reference: got {file}, which does not exist; allowed: a file of statistics; check the path")
    moments, origin = load_statistics(file) if file.suffix == ".safetensors" else (_npz(file, wanted.count or 2), None)
    if origin is not None:
        wanted.check(origin, file, "give those of this protocol, or the pictures")
    if len(moments.mean) != dim:
        raise InputError(
            f"reference: got {file}, of features of length {len(moments.mean)}, for an extractor of {dim}; allowed: "
            "statistics that the protocol's extractor made"
        )
    if wrong := _impossible(moments):
        raise InputError(
            f"reference: got {file}, which holds no statistics ({wrong}); allowed: a mean and a covariance, symmetric "
            "and without negative variances; make it again"
        )
    return moments, origin


def _impossible(moments: Moments) -> str | None:
    """Returns why no set of images can have these moments; None if no reason is found."""
    if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.scatter).all()):
        return "a number is not finite"
    sigma: Tensor = moments.covariance
    skew = (sigma - sigma.T).abs().max().item()
    if skew > ROUNDING * sigma.abs().max().item():
        return f"sigma is not symmetric: two entries differ by {skew:.2g}"
    values = torch.linalg.eigvalsh(sigma)
    if values[0] < -ROUNDING * values[-1].clamp_min(0):
        return f"sigma has an eigenvalue of {values[0].item():.2g}, the largest being {values[-1].item():.2g}"
    return None


def _npz(file: Path, count: int) -> Moments:
    try:
        with np.load(file, allow_pickle=False) as held:
            mean, sigma = (torch.from_numpy(held[name].astype(np.float64)) for name in ("mu", "sigma"))
        if mean.ndim != 1 or sigma.shape != (len(mean), len(mean)):
            raise ValueError(f"mu {tuple(mean.shape)} and sigma {tuple(sigma.shape)} do not fit")
    except Exception as error:  # zip, zlib and numpy each raise their own types; all mean the same
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"reference: got {file}, which holds no statistics ({reason}); allowed: an .npz with mu and sigma"
        ) from error
    return Moments(count, mean, sigma * (count - 1))
