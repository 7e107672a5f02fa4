"""stepdistill: distils a diffusion or flow pipeline of 25-50 steps into one of 1-8, and measures what that costs.

The public names, each imported on first use:

    schedules, prediction, timegrid, solvers, guidance    the core
    convert                                               converts between prediction types
    load_teacher, Teacher, methods, Trainer, TrainConfig  distillation
    sample, sample_lcm, evaluate                          sampling and measurement
    baselines                                             classifier, language-model and architecture distillation
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = ("baselines", "guidance", "methods", "prediction", "schedules", "solvers", "timegrid")
_NAMES = {
    "InputError": "stepdistill.errors",
    "Teacher": "stepdistill.denoiser.load",
    "TrainConfig": "stepdistill.training.config",
    "Trainer": "stepdistill.training.trainer",
    "convert": "stepdistill.prediction",
    "evaluate": "stepdistill.evaluation.suite",
    "load_teacher": "stepdistill.denoiser.load",
    "sample": "stepdistill.sampling",
    "sample_lcm": "stepdistill.methods.consistency",
}
__all__ = sorted([*_MODULES, *_NAMES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"stepdistill.{name}")
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'stepdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
