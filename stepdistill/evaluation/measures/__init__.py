"""The metrics of every file here, by the names used in protocols, all computed from one pass over the images."""

from __future__ import annotations

import importlib
import pkgutil

from stepdistill.evaluation.measures.base import NO_PICTURES, Metric, View


def _listed() -> dict[str, type[Metric]]:
    """Returns every Metric that defines a name, by name."""
    files = sorted(file.name for file in pkgutil.iter_modules(__path__))
    held = [vars(importlib.import_module(f"{__name__}.{file}")) for file in files]
    kinds = [kind for module in held for kind in module.values() if isinstance(kind, type) and issubclass(kind, Metric)]
    return {kind.name: kind for kind in kinds if "name" in vars(kind)}


METRICS: dict[str, type[Metric]] = _listed()

__all__ = ["METRICS", "NO_PICTURES", "Metric", "View"]
