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
    parsed = read_yaml(Path(path), "--config")
    if isinstance(parsed, dict):
        parsed = spelled(parsed, kind)
        _check_method(path, parsed, kind)
    return built(kind, parsed, f"--config {path}", base)


def spelled(settings: Mapping[str, object], kind: type) -> dict[str, object]:
    """Settings under their fields' names, from names that may have hyphens; a list of one may be a single value."""
    kinds, fields = get_type_hints(kind), {str(name).replace("-", "_"): value for name, value in settings.items()}
    for name, value in fields.items():
        if get_origin(kinds.get(name)) is tuple and not isinstance(value, list):
            fields[name] = [value]
    return fields


def _check_method(path: Path, names: Iterable[str], kind: type) -> None:
    """Raises InputError if a file's names are not all this configuration's, but all another method's."""
    from stepdistill.training.plans import FLAGS

    def knows(other: type) -> bool:
        return set(names) <= {each.name for each in dataclasses.fields(other)}

    if not knows(kind):
        for method, (module, name) in FLAGS.items():
            if knows(getattr(importlib.import_module(module), name)):
                command = "lcm (or lcm-lora)" if method == "lcm" else method
                raise InputError(
                    f"--config: got {path}, whose settings are of {method}; allowed: those of a {kind.__name__}; give "
                    f"it to stepdistill train {command}"
                )
