"""Distillation methods by name, one file each."""

from __future__ import annotations

from importlib import import_module

from stepdistill.errors import InputError

REGISTRY = {
    "lcm": "consistency.LatentConsistency",
    "add": "adversarial.Adversarial",
    "ladd": "latent_adversarial.LatentAdversarial",
    "progressive": "progressive.Progressive",
}


def get(name: str) -> type:
    """Returns the class of a method.

    Raises:
        InputError: the name is unknown.
    """
    if name not in REGISTRY:
        raise InputError(f"method: got {name!r}; allowed: {', '.join(REGISTRY)}")
    module, cls = REGISTRY[name].split(".")
    return getattr(import_module(f"stepdistill.methods.{module}"), cls)
