"""The kernel distance between features of generated and real images; KID (Binkowski et al. 2018) if Inception's."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.kernel import mmd_figure, polynomial, within
from stepdistill.evaluation.measures.base import Metric, View
from stepdistill.evaluation.real import RealPictures


class KernelDistance(Metric):
    """`kid`: over all images at once, whereas other tools average 100 random subsets of 1,000."""

    name, keeps, better, needs, revision = "kid", "features", {"kid": "lower"}, ("features",), 2

    @staticmethod
    def see(view: View) -> Tensor:
        return view.features

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        return {"kid": mmd_figure(kept, tools.real.features, polynomial, _within(tools.real))}


@lru_cache(maxsize=1)
def _within(real: RealPictures) -> float:
    return within(real.features, polynomial)
