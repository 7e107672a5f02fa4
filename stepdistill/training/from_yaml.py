"""Reads the configuration of a run from a YAML file."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar, get_origin, get_type_hints

from stepdistill.errors import InputError
from stepdistill.training.config import LoopConfig
from stepdistill.typed import built, read_yaml

C = TypeVar("C", bound=LoopConfig)


def from_yaml(path: Path, kind: type[C], base: C | None = None) -> C:
    """Reads a configuration from a YAML file; what it does not set is as in `base`, if given, else the default. Names
    may have hyphens, as flags do; a list of one may be a single value.

    Raises:
        InputError: no such file, not a mapping, an unknown name (with the nearest valid one), or a bad value.
    """
    told = read_yaml(Path(path), "--config")
    if isinstance(told, dict):
        told = spelled(told, kind)
        _check_method(path, told, kind)
    return built(kind, told, f"--config {path}", base)


def spelled(told: Mapping[str, object], kind: type) -> dict[str, object]:
    """Settings under their fields' names, from names that may have hyphens; a list of one may be a single value."""
    kinds, found = get_type_hints(kind), {str(name).replace("-", "_"): value for name, value in told.items()}
    for name, value in found.items():
        if get_origin(kinds.get(name)) is tuple and not isinstance(value, list):
            found[name] = [value]
    return found


def _check_method(path: Path, told: Iterable[str], kind: type) -> None:
    """Raises InputError if a file's names are not all this configuration's, but all another method's."""
    from stepdistill.training.plans import FLAGS

    def knows(other: type) -> bool:
        return set(told) <= {each.name for each in dataclasses.fields(other)}

    if not knows(kind):
        for method, (module, name) in FLAGS.items():
            if knows(getattr(importlib.import_module(module), name)):
                command = "lcm (or lcm-lora)" if method == "lcm" else method
                raise InputError(
                    f"--config: got {path}, whose settings are of {method}; allowed: those of a {kind.__name__}; give "
                    f"it to stepdistill train {command}"
                )
