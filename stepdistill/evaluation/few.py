"""Whether images are too few for the Frechet distance to order models: fewer than the extractor has features.

The distance's bias is larger for the more diverse of two models. With fewer images than features it can outweigh what
they differ by, even at equal n, so that the worse model has the lower distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepdistill.evaluation.frechet_limit import PER_FEATURE

FEATURES = {"EfficientNet-Lite2": 1280, "Inception": 2048, "DINOv2-ViT-S14": 384}  # of rows older than fd_features


def too_few(row: Mapping[str, Any]) -> str | None:
    """Returns a line about a row's n; None if it is enough, or the number of features is not known."""
    name, n = row.get("fd_extractor") or "", row.get("n")
    features = row.get("fd_features") or next((d for title, d in FEATURES.items() if name.startswith(title)), None)
    if row.get("fd") is None or not n or not features or n >= features:
        return None
    return (
        f"n = {n:,} is below the {features:,} features of {name}: FD’s bias differs between models and can turn their "
        f"order; rely on KID, or on FD∞ from n = {round(PER_FEATURE * features):,}"
    )
