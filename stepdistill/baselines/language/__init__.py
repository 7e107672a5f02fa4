"""Distillation of language models; `losses` holds the divergences, and each method is a file."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "losses":
        return import_module("stepdistill.baselines.language.losses")
    raise AttributeError(f"module 'stepdistill.baselines.language' has no attribute {name!r}")
