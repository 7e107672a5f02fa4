"""Precision, recall, density and coverage of features relative to those of real images; see `evaluation.manifold`."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.manifold import LARGEST, prdc_figures, radii
from stepdistill.evaluation.measures.base import Metric, View
from stepdistill.evaluation.real import RealPictures


class Prdc(Metric):
    """`precision` and `recall` with 3 neighbours, `density` and `coverage` with 5."""

    name, keeps, needs, revision = "prdc", "features", ("features",), 2
    least = LARGEST + 1
    better = dict.fromkeys(("precision", "recall", "density", "coverage"), "higher")

    @staticmethod
    def see(view: View) -> Tensor:
        return view.features

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        return prdc_figures(kept, tools.real.features, _radii(tools.real))


@lru_cache(maxsize=1)
def _radii(real: RealPictures) -> Tensor:
    return radii(real.features)
