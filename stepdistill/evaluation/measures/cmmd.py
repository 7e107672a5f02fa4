"""CMMD: the kernel distance between CLIP's embeddings of generated and real images (Jayasumana et al. 2024).

The paper uses CLIP ViT-L/14 at 336 pixels; here it is the protocol's scorer, under whose name it is reported.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.kernel import gaussian, mmd_figure, within
from stepdistill.evaluation.measures.base import Metric, View, no_scorer
from stepdistill.evaluation.real import RealPictures

SCALE = 1000.0  # the authors'


class Cmmd(Metric):
    """`cmmd`, unbiased as in the paper's eq. 4; the authors' code also includes the pairs of each image with itself,
    which adds about SCALE (1 - E k) (1 / n + 1 / m)."""

    name, keeps, better, needs, revision = "cmmd", "embeddings", {"cmmd": "lower"}, ("embeddings",), 2

    @classmethod
    def lacks(cls, tools) -> str | None:
        return no_scorer(tools) or super().lacks(tools)

    @staticmethod
    def see(view: View) -> Tensor:
        return view.embedding.cpu()

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        return {"cmmd": mmd_figure(kept, tools.real.embeddings, gaussian, _within(tools.real), SCALE)}


@lru_cache(maxsize=1)
def _within(real: RealPictures) -> float:
    return within(real.embeddings, gaussian)
