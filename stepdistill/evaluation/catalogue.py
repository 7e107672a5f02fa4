"""Published models, ready to be measured: benchmarks/models.yaml, used as `--model @sdxl-turbo`.

ready("sdxl-lightning")        # its SPEC, what each step count adds to it, and the source
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from stepdistill.errors import InputError
from stepdistill.evaluation import shipped
from stepdistill.typed import read_yaml


@dataclass(frozen=True)
class Ready:
    """A published model and how its authors sample it.

    Attributes:
        name: as written after the @. spec: a SPEC. steps: the intended step counts, and what each adds to the SPEC.
        method: the distillation method. teacher: id of the model it was distilled from; None for a teacher.
        source: where these settings are published. note: remarks for the reader.
    """

    name: str
    spec: str
    steps: Mapping[int, str]
    method: str
    source: str
    teacher: str | None = None
    note: str = ""


@lru_cache(maxsize=1)
def catalogue() -> dict[str, Ready]:
    """Returns all ready models by name.

    Raises:
        InputError: an entry is malformed.
    """
    file = shipped.places("models.yaml")[0]
    return {name: _read(name, entry, file) for name, entry in read_yaml(file, "ready models").items()}


def _read(name: str, entry: Any, file: Path) -> Ready:
    known = {f.name for f in dataclasses.fields(Ready)} - {"name"}
    if not isinstance(entry, dict) or (unknown := set(entry) - known):
        got = f"the field {min(unknown)!r}" if isinstance(entry, dict) else repr(entry)
        raise InputError(f"{file}, {name}: got {got}; allowed: {', '.join(sorted(known))}")
    if missing := {"spec", "steps", "method", "source"} - set(entry):
        raise InputError(f"{file}, {name}: got no {min(missing)!r}; add it")
    steps = entry["steps"]
    return Ready(name, **entry | {"steps": steps if isinstance(steps, dict) else dict.fromkeys(steps, "")})


def ready(name: str) -> Ready:
    """Returns a ready model by name.

    Raises:
        InputError: there is none of that name; the message suggests the closest.
    """
    if name not in catalogue():
        near = difflib.get_close_matches(name, catalogue(), 1)
        hint = f"did you mean @{near[0]}?" if near else "stepdistill bench --list-models lists them"
        raise InputError(f"--model @{name}: got no such ready model; allowed: {', '.join(catalogue())}; {hint}")
    return catalogue()[name]


def listed() -> str:
    """Returns the catalogue as text, one paragraph per model."""
    lines = []
    for entry in catalogue().values():
        steps = " ".join(map(str, entry.steps))
        lines += [f"@{entry.name}  {entry.method}; steps {steps}", f"    {entry.spec}"]
        lines += [f"    {count:>3} steps: {more}" for count, more in entry.steps.items() if more]
        lines += [f"    {text}" for text in (entry.note, entry.source) if text]
    return "\n".join(lines)
