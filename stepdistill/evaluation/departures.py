"""Where a model is sampled otherwise than its protocol says, by its SPEC, its export or its pipeline: to be reported.

A protocol's scheduler, spacing, guidance and step counts are defaults, so each of them can be overridden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.evaluation.generate import Sampler
from stepdistill.evaluation.protocols import Protocol
from stepdistill.evaluation.schedulers import SCHEDULERS
from stepdistill.evaluation.spec import ModelSpec
from stepdistill.export.folder import trained_steps

Plan = Sequence[tuple[str, Any, tuple[int, ...]]]  # see `spec.plan_of`


def of_steps(plan: Plan, protocol: Protocol, explicit_steps: bool) -> list[str]:
    """Returns a line for each model of which no step count is the protocol's, and for each progressive student measured
    at step counts that it was not distilled for.

    Args:
        explicit_steps: whether the user named the step counts, which needs no report.
    """
    lines: dict[str, None] = {}
    for name, model, counts in plan if protocol.steps and not explicit_steps else ():
        if isinstance(model, ModelSpec) and not set(counts) & set(protocol.steps):
            model_steps, protocol_steps = (" ".join(map(str, each)) for each in (counts, protocol.steps))
            override = f"its own steps {model_steps} override {protocol.name}'s {protocol_steps}"
            lines[f"{name}: {override}; --steps {protocol_steps} selects those"] = None
    for name, model, counts in plan:
        trained = trained_steps(model.lora) if isinstance(model, ModelSpec) else None
        if trained is not None and set(counts) != {trained}:
            lines[f"{name}: a progressive student for {trained} steps; at other step counts it is not what it was"
                  " distilled to be"] = None  # fmt: skip
    return list(lines)


def of_specs(plan: Plan, protocol: Protocol) -> list[str]:
    """Returns a line for each model whose SPEC alone, before it is loaded, departs from the protocol's sampling."""
    lines = (_line(name, _of_spec(model), protocol) for name, model, _ in plan if isinstance(model, ModelSpec))
    return list(dict.fromkeys(filter(None, lines)))


def of_loaded(name: str, sampler: Sampler, protocol: Protocol) -> str | None:
    """Returns a line with what of a loaded model's sampling departs from the protocol's; None if nothing does."""
    scheduler = type(sampler.pipeline.scheduler).__name__
    settings = {"scheduler": scheduler, "spacing": sampler.spacing, "guidance": sampler.guidance}
    return _line(name, settings, protocol)


def _line(name: str, settings: Mapping[str, Any], protocol: Protocol) -> str | None:
    differences = [
        f"{field} {_word(settings[field])} instead of {_word(value)}"
        for field, value in _of_protocol(protocol).items()
        if field in settings and settings[field] != value
    ]
    return f"{name} differs from {protocol.name}: {', '.join(differences)}" if differences else None


def _of_protocol(protocol: Protocol) -> dict[str, Any]:
    """Returns what a protocol says of scheduler, spacing and guidance."""
    found: dict[str, Any] = {}
    if protocol.sampler is not None:
        found["scheduler"], options = SCHEDULERS[protocol.sampler.scheduler]
        found["spacing"] = protocol.sampler.spacing or options.get("timestep_spacing")
    return found | ({} if protocol.guidance is None else {"guidance": protocol.guidance})


def _of_spec(spec: ModelSpec) -> dict[str, Any]:
    """Returns what a SPEC says of the same. Without a named spacing, a LoRA's export may decide it."""
    found: dict[str, Any] = {}
    if spec.scheduler:
        found["scheduler"], options = SCHEDULERS[spec.scheduler]
        found |= {} if spec.lora else {"spacing": options.get("timestep_spacing")}
    found |= {"spacing": spec.spacing} if spec.spacing else {}
    found |= {"spacing": None} if spec.timesteps else {}
    return found | ({} if spec.guidance is None else {"guidance": spec.guidance})


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value or "none")
