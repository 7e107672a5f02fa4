"""The Frechet distance in the limit of infinitely many images (Chong and Forsyth 2020)."""

from __future__ import annotations

from torch import Tensor

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.frechet_limit import GROUPS, PER_FEATURE, frechet_limit
from stepdistill.evaluation.measures.base import Metric, View
from stepdistill.evaluation.measures.frechet import cached_figure


class FrechetLimit(Metric):
    """`fd_inf`; see `evaluation.frechet_limit`."""

    name, keeps, better, revision = "fd_inf", "features", {"fd_inf": "lower"}, 2
    least, per_feature = 2 * GROUPS, PER_FEATURE

    @staticmethod
    def see(view: View) -> Tensor:
        return view.features

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        return {"fd_inf": frechet_limit(kept, tools.reference, cached_figure(kept, tools.reference))}
