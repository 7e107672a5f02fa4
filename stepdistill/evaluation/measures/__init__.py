"""The metrics, by the names that protocols list them by: one file each, all fed by one pass over the pictures."""

from __future__ import annotations

from stepdistill.evaluation.measures.attributes import Attributes
from stepdistill.evaluation.measures.base import Metric, View
from stepdistill.evaluation.measures.clip import ClipScore
from stepdistill.evaluation.measures.frechet import FrechetDistance

METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in (FrechetDistance, ClipScore, Attributes)}

__all__ = ["METRICS", "Metric", "View"]
