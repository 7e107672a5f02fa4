"""The Frechet distance between features of generated and real images; FID if they are Inception's."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.frechet import Moments, frechet_figure
from stepdistill.evaluation.measures.base import Metric, View


class FrechetDistance(Metric):
    """`fd`: see `evaluation.frechet`."""

    name, keeps, better = "fd", "features", {"fd": "lower"}

    @staticmethod
    def see(view: View) -> Tensor:
        return view.features

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        return {"fd": cached_figure(kept, tools.reference)}


@lru_cache(maxsize=1)
def cached_figure(kept: Tensor, reference: Moments) -> Figure:
    """Computes the distance; cached because `fd_inf` starts from it too."""
    return frechet_figure(kept, reference)
