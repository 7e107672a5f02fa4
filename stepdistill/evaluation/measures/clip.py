"""CLIP score: how well images match their prompts (Hessel et al. 2021)."""

from __future__ import annotations

from torch import Tensor

from stepdistill.evaluation.clip import clip_scores
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.measures.base import Metric, View, no_scorer


class ClipScore(Metric):
    """`clip_score`: the mean of 100 max(cos, 0), or with the protocol's scale instead of 100."""

    name, keeps, better = "clip", "clip_scores", {"clip_score": "higher"}

    @classmethod
    def lacks(cls, tools) -> str | None:
        return no_scorer(tools)

    @staticmethod
    def see(view: View) -> Tensor:
        return clip_scores(view.embedding, view.text, view.tools.clip.scale).cpu()

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        return {"clip_score": Figure.mean(kept)}
