"""Model SPECs: a pipeline and how to sample it, in one command-line argument.

    path,lora=DIR,scheduler=lcm,guidance=1.5,variant=fp16,dtype=bf16,name=student     or     student=path,lora=DIR,...

The path is a diffusers folder, a hub id, or avatars. For the path and the LoRA, a training run's folder means the
export in it, and owner/name/file.safetensors is a file on the hub. @NAME is a published model of `catalogue`, and may
be followed by options that override its own. The result is a plain diffusers pipeline.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill import embedded
from stepdistill.errors import InputError
from stepdistill.evaluation.catalogue import ready
from stepdistill.evaluation.schedulers import PREDICTIONS, SCHEDULERS, SPACINGS
from stepdistill.export.folder import export_in

DTYPES = ("fp32", "fp16", "bf16")
SIGMAS = ("even", "own")


@dataclass(frozen=True)
class ModelSpec:
    """A model and how to sample it.

    Attributes:
        path: a pipeline folder, a hub id, or avatars. name: of its rows and curves.
        lora: a folder or hub id of LoRA weights. scheduler: a key of SCHEDULERS; None keeps the LoRA export's or the
            pipeline's. guidance: the guidance scale; 1.0 means none. variant: of the weight files. revision: of a hub
            repository. dtype: fp32, fp16 or bf16.
        sigmas: "even" passes even sigmas to a flow's scheduler, "own" leaves them to the pipeline; None follows the
            export's record.
        unet: a file of weights for the pipeline's UNet. spacing: the scheduler's timestep_spacing, as in model cards.
        prediction: the scheduler's prediction_type, of weights that predict other than the pipeline's.
        timesteps: replace the scheduler's. size: image side in pixels. tokens: maximum length of a prompt.
        ready: the name in the catalogue. changes: options that differ by step count.
    """

    path: str
    name: str
    lora: str | None = None
    scheduler: str | None = None
    guidance: float | None = None
    variant: str | None = None
    revision: str | None = None
    dtype: str | None = None
    sigmas: str | None = None
    unet: str | None = None
    spacing: str | None = None
    prediction: str | None = None
    timesteps: tuple[int, ...] | None = None
    size: int | None = None
    tokens: int | None = None
    ready: str | None = None
    changes: tuple[tuple[int, tuple[tuple[str, Any], ...]], ...] = ()

    def __str__(self) -> str:
        options = {name: getattr(self, name) for name in OPTIONS if name != "name"}
        options["timesteps"] = self.timesteps and "+".join(map(str, self.timesteps))
        return ",".join([self.path, *(f"{k}={v}" for k, v in options.items() if v is not None)])

    @property
    def steps(self) -> tuple[int, ...]:
        """The step counts the model is meant for; empty if the SPEC names none."""
        return tuple(count for count, _ in self.changes) or (self.timesteps and (len(self.timesteps),)) or ()

    def at(self, steps: int) -> ModelSpec:
        """Returns the SPEC at a step count.

        Raises:
            InputError: its weights or times are for other step counts only.
        """
        found = dict(self.changes).get(steps)
        bound = any(changes for _, changes in self.changes) or self.timesteps
        if found is None and bound and steps not in self.steps:
            raise InputError(
                f"--steps: got {steps} for {self.name}, which is for {' '.join(map(str, self.steps))}; allowed: these; "
                "leave --steps out, or measure it apart"
            )
        return dataclasses.replace(self, changes=(), **dict(found or ()))


OPTIONS = tuple(f.name for f in dataclasses.fields(ModelSpec) if f.name not in ("path", "ready", "changes"))
NUMBERS = ("size", "tokens")
CHOICES = {
    "scheduler": SCHEDULERS, "spacing": SPACINGS, "prediction": PREDICTIONS, "sigmas": SIGMAS, "dtype": DTYPES,
}  # fmt: skip


def parse(text: str) -> ModelSpec:
    """Parses a SPEC or NAME=SPEC.

    Raises:
        InputError: no path, an unknown option (the message names the nearest), or an invalid value.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    values: dict[str, Any] = {}
    if "=" in first and "/" not in first.partition("=")[0]:  # else it belongs to the path
        name, _, first = first.partition("=")
        if name in OPTIONS:
            raise InputError(f"--model {text}: got the option {name}= where the path belongs; allowed: path,{name}=…")
        values["name"] = name
    if not first:
        raise InputError(
            f"--model {text!r}: got no path; allowed: a pipeline folder, a hub id, or avatars, then options"
        )
    values |= _options(rest, text)
    named = Path(values.get("lora") or first).name
    if values.get("lora"):
        values["lora"] = export_in(values["lora"])
    if first.startswith("@"):
        return _ready(first[1:], values)
    values.setdefault("name", named)
    return ModelSpec(path=first if first in embedded.TEACHERS else export_in(first), **values)


def _options(parts: Sequence[str], text: str) -> dict[str, Any]:
    """Parses key=value options into a ModelSpec's values; `text` is for error messages."""
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in OPTIONS:
            near = difflib.get_close_matches(key, OPTIONS, 1)
            hint = f"; did you mean {near[0]}=?" if near else ""
            raise InputError(
                f"--model {text}: got the option {part!r}; allowed: {', '.join(o + '=' for o in OPTIONS)}{hint}"
            )
        if not value:
            raise InputError(f"--model {text}: got {key}= with no value; give one or leave it out")
        values[key] = value
    if "guidance" in values:
        values["guidance"] = _guidance(values["guidance"])
    for key in NUMBERS:
        if key in values:
            values[key] = _positive_int(key, values[key])
    if "timesteps" in values:
        values["timesteps"] = tuple(_positive_int("timesteps", part) for part in values["timesteps"].split("+"))
    for key, allowed in CHOICES.items():
        if values.get(key) is not None and values[key] not in allowed:
            near = difflib.get_close_matches(values[key], allowed, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"--model {text}: got {key}={values[key]}; allowed: {', '.join(allowed)}{hint}")
    return values


def _ready(name: str, values: dict[str, Any]) -> ModelSpec:
    """Returns a model of the catalogue; the user's options override its own at every step count."""
    entry = ready(name)
    path, *rest = entry.spec.split(",")
    common = {"name": name} | _options(rest, entry.spec) | values
    changes = []
    for count, more in entry.steps.items():
        own = _options(more.split(","), more) if more else {}
        changes.append((count, tuple((k, v) for k, v in own.items() if k not in values)))
    return ModelSpec(path=path, **common, ready=name, changes=tuple(changes))


def _positive_int(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{key}: got {value!r}; allowed: a whole number, 1 or more")
    return int(value)


def as_models(pipeline: Any) -> dict[str, Any]:
    """Returns name -> ModelSpec or loaded pipeline.

    Raises:
        InputError: a bad SPEC, or a repeated name.
    """
    if isinstance(pipeline, Mapping):
        return {
            name: dataclasses.replace(parse(m), name=name) if isinstance(m, str) else m for name, m in pipeline.items()
        }
    many = pipeline if isinstance(pipeline, (list, tuple)) else [pipeline]
    models: dict[str, Any] = {}
    for model in many:
        model = parse(model) if isinstance(model, str) else model
        name = model.name if isinstance(model, ModelSpec) else type(model).__name__
        if name in models:
            raise InputError(f"--model: got the name {name!r} twice; give one another: NAME=SPEC")
        models[name] = model
    if not models:
        raise InputError("--model: got none; allowed: one or more, as teacher=avatars,scheduler=ddim")
    return models


def plan_of(
    models: Mapping[str, Any], steps: Sequence[int] | None, default: Sequence[int]
) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Returns (name, model, step counts) in order; a model that differs by step count is split into several entries.

    Args:
        steps: the requested step counts; None uses each model's, or `default` for models that name none.

    Raises:
        InputError: a model does not support a step count.
    """
    plan: list[tuple[str, Any, tuple[int, ...]]] = []
    for name, model in models.items():
        parts: dict[Any, list[int]] = {}
        if not isinstance(model, ModelSpec):
            plan.append((name, model, tuple(steps or default)))
            continue
        for count in steps or model.steps or default:
            parts.setdefault(model.at(count), []).append(count)
        plan += [(name, part, tuple(counts)) for part, counts in parts.items()]
    return plan


def _guidance(value: str) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise InputError(f"guidance: got {value!r}; allowed: a number, 1.0 (none) or more") from error
    if not 1 <= number < float("inf"):
        raise InputError(f"guidance: got {value}; allowed: 1.0 (none) or more")
    return number
