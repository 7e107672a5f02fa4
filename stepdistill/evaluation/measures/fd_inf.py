"""The Frechet distance that endlessly many pictures would have (Chong and Forsyth 2020)."""

from __future__ import annotations

from torch import Tensor

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.frechet import PARTS, frechet_limit
from stepdistill.evaluation.measures.base import Metric, View


class FrechetLimit(Metric):
    """`fd_inf`, and `fd_inf_r2` of the line it is read from; see `evaluation.frechet.frechet_limit`."""

    name, keeps, better = "fd_inf", "features", {"fd_inf": "lower", "fd_inf_r2": "higher"}
    least = 2 * PARTS

    @staticmethod
    def see(view: View) -> Tensor:
        return view.features

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        limit, r2 = frechet_limit(kept, tools.reference)
        return {"fd_inf": limit, "fd_inf_r2": r2}
