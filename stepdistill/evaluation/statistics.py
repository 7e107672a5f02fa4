"""Statistics that others made of a reference, in place of its pictures: `--reference cifar10-32x32.npz`.

    moments = read_statistics("cifar10-32x32.npz", dim=2048, count=50000)

An .npz is what EDM, pytorch-fid, MLPerf and DMD2 write: `mu` (D,) and `sigma` (D, D), unbiased. It does not say how
many pictures it is of, nor through which resize: the protocol has to. A .safetensors is this package's own.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from stepdistill.errors import InputError
from stepdistill.evaluation.frechet import Moments

ENDINGS = (".npz", ".safetensors")


def are_statistics(reference: str) -> bool:
    """Whether a reference is named as a file of statistics."""
    return Path(reference).suffix in ENDINGS


def read_statistics(file: str | Path, *, dim: int, count: int | None = None) -> Moments:
    """The moments in a file.

    Args:
        dim: length of the extractor's features. count: pictures an .npz is of; it bears on nothing but what is
            reported.

    Raises:
        InputError: no such file, one that is damaged or needs pickle, or statistics of features of another length.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise InputError(f"reference: got {file}, which does not exist; allowed: a file of statistics; check the path")
    moments = Moments.load(file) if file.suffix == ".safetensors" else _npz(file, count or 2)
    if len(moments.mean) != dim:
        raise InputError(
            f"reference: got {file}, of features of length {len(moments.mean)}, for an extractor of {dim}; allowed: "
            "statistics that the protocol's extractor made"
        )
    return moments


def _npz(file: Path, count: int) -> Moments:
    try:
        with np.load(file, allow_pickle=False) as held:
            mean, covariance = (torch.from_numpy(held[name].astype(np.float64)) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit")
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError("a number is not finite")
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"reference: got {file}, which holds no statistics ({reason}); allowed: an .npz with mu and sigma"
        ) from error
    return Moments(count, mean, covariance * (count - 1))
