"""The metrics, by the names that protocols list them by: one file each, all fed by one pass over the pictures."""

from __future__ import annotations

from stepdistill.evaluation.measures.attributes import Attributes
from stepdistill.evaluation.measures.base import Metric, View
from stepdistill.evaluation.measures.clip import ClipScore
from stepdistill.evaluation.measures.cmmd import Cmmd
from stepdistill.evaluation.measures.copies import Copies
from stepdistill.evaluation.measures.diversity import Diversity
from stepdistill.evaluation.measures.fd_inf import FrechetLimit
from stepdistill.evaluation.measures.frechet import FrechetDistance
from stepdistill.evaluation.measures.kid import KernelDistance
from stepdistill.evaluation.measures.prdc import Prdc
from stepdistill.evaluation.measures.preference import Hpsv2, ImageReward, PickScore

METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        FrechetDistance, FrechetLimit, KernelDistance, Prdc, Cmmd, ClipScore, Attributes, Diversity, Copies,
        PickScore, Hpsv2, ImageReward,
    )
}  # fmt: skip

__all__ = ["METRICS", "Metric", "View"]
