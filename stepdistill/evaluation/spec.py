"""Model SPECs: a pipeline and how it is to be sampled, in one word of a command line.

    path,lora=DIR,scheduler=lcm,guidance=1.5,variant=fp16,dtype=bf16,name=student     or     student=path,lora=DIR,...

The path is a diffusers folder, a hub id, or avatars; for it, and for the LoRA, a training run's folder stands for the
export in it. What is built is a plain diffusers pipeline.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill import embedded
from stepdistill.errors import InputError
from stepdistill.evaluation import hashes
from stepdistill.evaluation.generate import told_guidance
from stepdistill.evaluation.places import check_lora, export_in

DTYPES = ("fp32", "fp16", "bf16")
SIGMAS = ("even", "own")
# name: (diffusers class, what is set on top of the pipeline's own scheduler configuration).
TRAILING = {"timestep_spacing": "trailing"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", TRAILING | {"set_alpha_to_one": True, "clip_sample": False}),
    "lcm": ("LCMScheduler", {"clip_sample": False, "original_inference_steps": 50}),
    "tcd": ("TCDScheduler", {"clip_sample": False}),
    "dpmpp": ("DPMSolverMultistepScheduler", TRAILING | {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}),
    "euler": ("EulerDiscreteScheduler", TRAILING),
    "euler-a": ("EulerAncestralDiscreteScheduler", TRAILING),
    "heun": ("HeunDiscreteScheduler", TRAILING),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-lcm": ("FlowMatchLCMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", TRAILING | {"final_sigmas_type": "zero"}),
}
FLOWS = ("flow-euler", "flow-lcm")
UNGUIDED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")


@dataclass(frozen=True)
class ModelSpec:
    """A model and how to sample it.

    Attributes:
        path: a pipeline folder, a hub id, or avatars. name: of its rows and curves.
        lora: a folder or hub id of LoRA weights. scheduler: a key of SCHEDULERS; None keeps the LoRA export's or the
            pipeline's own. guidance: 1.0 is none. variant: of the weight files. dtype: fp32, fp16 or bf16.
        sigmas: even asks a flow's scheduler for even ones, own leaves them to the pipeline; None is as the export's
            record says.
    """

    path: str
    name: str
    lora: str | None = None
    scheduler: str | None = None
    guidance: float | None = None
    variant: str | None = None
    dtype: str | None = None
    sigmas: str | None = None

    def __str__(self) -> str:
        options = [
            f"{k}={v}" for k, v in dataclasses.asdict(self).items() if k not in ("path", "name") and v is not None
        ]
        return ",".join([self.path, *options])


OPTIONS = tuple(f.name for f in dataclasses.fields(ModelSpec) if f.name != "path")


def parse(text: str) -> ModelSpec:
    """A SPEC, or NAME=SPEC.

    Raises:
        InputError: no path, an unknown option (the nearest is named), or a value not allowed.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    values: dict[str, Any] = {}
    if "=" in first:
        name, _, first = first.partition("=")
        if name in OPTIONS:
            raise InputError(f"--model {text}: got the option {name}= where the path belongs; allowed: path,{name}=…")
        values["name"] = name
    if not first:
        raise InputError(
            f"--model {text!r}: got no path; allowed: a pipeline folder, a hub id, or avatars, then options"
        )
    for part in rest:
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
    for key, allowed in (("scheduler", SCHEDULERS), ("sigmas", SIGMAS), ("dtype", DTYPES)):
        if values.get(key) is not None and values[key] not in allowed:
            near = difflib.get_close_matches(values[key], allowed, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"--model {text}: got {key}={values[key]}; allowed: {', '.join(allowed)}{hint}")
    values.setdefault("name", Path(values.get("lora") or first).name)
    if values.get("lora"):
        values["lora"] = export_in(values["lora"])
    return ModelSpec(path=first if first in embedded.TEACHERS else export_in(first), **values)


def as_models(pipeline: Any) -> dict[str, Any]:
    """name -> ModelSpec or loaded pipeline.

    Raises:
        InputError: a bad SPEC, or a name twice.
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


def _guidance(value: str) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise InputError(f"guidance: got {value!r}; allowed: a number, 1.0 (none) or more") from error
    if not 1 <= number < float("inf"):
        raise InputError(f"guidance: got {value}; allowed: 1.0 (none) or more")
    return number


def load(spec: ModelSpec, *, device: str = "cpu"):
    """The plain diffusers pipeline of a SPEC, with its LoRA and scheduler.

    Raises:
        InputError: the pipeline or LoRA is not there, cannot be reached, or does not fit.
    """
    import torch

    from stepdistill.denoiser.load import open_pipeline

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}[spec.dtype]
    pipeline = open_pipeline(spec.path, variant=spec.variant, dtype=dtype)
    if spec.lora:
        _load_lora(pipeline, spec.lora)
    pipeline.scheduler = _scheduler(pipeline, spec)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _load_lora(pipeline, lora: str) -> None:
    from stepdistill.export.adapters import load_whole

    check_lora(lora)
    load_whole(pipeline, lora)


def _scheduler(pipeline, spec: ModelSpec):
    import diffusers

    from stepdistill.denoiser.families import is_flow

    own = Path(spec.lora or "") / "scheduler"
    exported = (
        json.loads((own / "scheduler_config.json").read_text()) if (own / "scheduler_config.json").is_file() else None
    )
    wanted = SCHEDULERS[spec.scheduler][0] if spec.scheduler else None
    if spec.lora and exported and wanted in (None, exported["_class_name"]):
        return getattr(diffusers, exported["_class_name"]).from_pretrained(own)
    if not spec.scheduler:
        return pipeline.scheduler
    flow = is_flow(pipeline.scheduler)
    if (spec.scheduler in FLOWS) != flow:
        allowed = ", ".join(FLOWS if flow else (name for name in SCHEDULERS if name not in FLOWS))
        raise InputError(
            f"scheduler: got {spec.scheduler} for a model of {'a flow' if flow else 'no flow'}; allowed: {allowed}"
        )
    name, options = SCHEDULERS[spec.scheduler]
    config = {k: v for k, v in pipeline.scheduler.config.items() if k not in ("timestep_spacing", "final_sigmas_type")}
    if wanted == type(pipeline.scheduler).__name__ and wanted in UNGUIDED:
        return pipeline.scheduler
    return getattr(diffusers, name).from_config(config, **options)


def guidance_of(spec: ModelSpec, pipeline, default: float | None = None) -> float:
    """What a model is guided with.

    The SPEC's guidance, where it says one. Of a student that is told its guidance (LCM's w), the middle of the range it
    was trained on, then `default`, the protocol's. Of other students, ours and consistency models, none. Else
    `default`, then the pipeline's own.
    """
    import inspect

    if spec.guidance is not None:
        return spec.guidance
    told = told_guidance(pipeline)
    if told and (trained := _record(spec).get("guidance")):
        ends = trained if isinstance(trained, list) else [trained]
        return (float(ends[0]) + float(ends[-1])) / 2
    if not told and (type(pipeline.scheduler).__name__ in UNGUIDED or _record(spec).get("method")):
        return 1.0
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("guidance_scale")
    if parameter is None:
        return 1.0
    return default if default is not None else float(parameter.default)


def even_of(spec: ModelSpec, pipeline) -> bool:
    """Whether a model is sampled at even sigmas: as the SPEC says, else as its export's record does.

    Raises:
        InputError: the SPEC asks for them, and the pipeline or its scheduler takes none.
    """
    from stepdistill.denoiser.families import takes_sigmas

    takes = takes_sigmas(pipeline, pipeline.scheduler)
    if spec.sigmas == "even" and not takes:
        got = f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__}"
        raise InputError(
            f"sigmas: got even for {got}, which take none; allowed: a flow with flow-euler or flow-lcm; leave it out"
        )
    return takes and (spec.sigmas or _record(spec).get("sigmas")) == "even"


def fingerprint(pipeline) -> str:
    """16 hex digits of every weight, LoRA setting and scheduler setting: a row's model, whatever its path is called."""
    import torch

    digest = hashlib.sha256(type(pipeline).__name__.encode())
    for name, module in sorted(pipeline.components.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        for adapter, config in sorted((getattr(module, "peft_config", None) or {}).items()):
            digest.update(f"{name}.{adapter} r={config.r} alpha={config.lora_alpha}".encode())
        digest.update(f"{name} {hashes.of_module(module)}".encode())
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    digest.update(json.dumps([type(pipeline.scheduler).__name__, scheduler], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def training_record(spec: ModelSpec) -> dict[str, Any]:
    """What an export says of its making: method, teacher, train_seconds. Empty where it says nothing."""
    record = _record(spec)
    return {k: record.get(k) for k in ("method", "teacher", "train_seconds")} if record else {}


def _record(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of the LoRA's folder, of a pipeline's without one; of a kohya file, the one in its header."""
    if spec.lora and Path(spec.lora).is_file():
        from stepdistill.export.kohya import kohya_record

        return kohya_record(Path(spec.lora))
    try:
        record = json.loads((Path(spec.lora or spec.path) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
