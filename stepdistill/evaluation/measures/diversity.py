"""Diversity of the images of one prompt: a distilled model may always generate the same one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.evaluation import hashes
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.measures.base import Metric, View

TRUNK = "alexnet-owt-7be5be79.pth"  # torchvision's AlexNet, in torch.hub's folder; torchmetrics has LPIPS's few weights
Distance = Callable[[Tensor, Tensor], Tensor]  # of two batches, pairwise: (B, ...), (B, ...) -> (B,)


class Diversity(Metric):
    """`diversity_lpips` if the trunk of LPIPS (Zhang et al. 2018) is on disk, else `diversity_features`, the cosine
    distance of the extractor's features."""

    name, keeps, each, prompts = "diversity", "groups", 4, 64
    better = dict.fromkeys(("diversity_lpips", "diversity_features"), "higher")

    @classmethod
    def prepare(cls, device: torch.device | str) -> dict[str, str]:
        return {"lpips": hashes.of_module(_lpips(str(device)))} if trunk() else {}

    @staticmethod
    def see(view: View) -> Tensor:
        return view.pictures if trunk() else view.features

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        groups = kept.unflatten(0, (-1, Diversity.each))
        if trunk():
            return {"diversity_lpips": diversity_figure(groups, lpips(_lpips(str(tools.extractor.device))))}
        return {"diversity_features": diversity_figure(groups, cosine)}


def diversity_figure(groups: Tensor, distance: Distance) -> Figure:
    """Computes the mean over prompts of the mean distance between two images of a prompt.

    Args:
        groups: (prompts, each, ...), what was kept of each image.

    Raises:
        InputError: fewer than two images per prompt.
    """
    if groups.shape[1] < 2:
        raise InputError(f"diversity: got {groups.shape[1]} pictures a prompt; allowed: 2 or more")
    pairs = [distance(groups[:, i], groups[:, j]) for i, j in combinations(range(groups.shape[1]), 2)]
    return Figure.mean(torch.stack(pairs).mean(0), "prompts")


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Computes 1 - cos of features (B, D), pairwise."""
    return 1 - torch.cosine_similarity(a.double(), b.double())


def lpips(net: nn.Module, batch: int = 64) -> Distance:
    """Returns LPIPS with torchmetrics' network, for images (B, 3, H, W) uint8."""
    device = next(net.parameters()).device

    @torch.inference_mode()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(a.split(batch), b.split(batch), strict=True)
        pixels = ((p.to(device).float() / 127.5 - 1 for p in pair) for pair in pairs)
        return torch.cat([net(*pair).flatten().cpu() for pair in pixels])

    return distance


def trunk() -> bool:
    """Whether LPIPS's trunk is on disk."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / TRUNK).is_file()


@lru_cache(maxsize=1)
def _lpips(device: str) -> nn.Module:
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
