"""The plain diffusers pipeline of a SPEC, with its LoRA and scheduler, and the arguments to call it with.

spec = parse("base,lora=out/student,scheduler=lcm")
pipeline = load(spec)
pipeline("a red hat", num_inference_steps=4, guidance_scale=guidance_of(spec, pipeline), **call_of(spec, pipeline))
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from stepdistill.denoiser.families import drawn_size
from stepdistill.errors import InputError
from stepdistill.evaluation import hashes
from stepdistill.evaluation.catalogue import ready
from stepdistill.evaluation.generate import Sampler, accepted, backbone, is_guidance_conditioned, takes_guidance
from stepdistill.evaluation.places import beside, check_lora, fetched
from stepdistill.evaluation.protocols import SamplerSpec
from stepdistill.evaluation.schedulers import UNGUIDED, scheduler_of
from stepdistill.evaluation.spec import ModelSpec
from stepdistill.export.folder import read_record


def load(spec: ModelSpec, *, device: str = "cpu", sampler: SamplerSpec | None = None):
    """Loads the plain diffusers pipeline of a SPEC, with its LoRA and scheduler.

    Args:
        sampler: the protocol's, used if the SPEC names no scheduler or spacing and the model is not a student.

    Raises:
        InputError: the pipeline or LoRA is missing, cannot be downloaded, or does not fit.
    """
    import torch

    from stepdistill.denoiser.load import open_pipeline

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}[spec.dtype]
    pipeline = open_pipeline(spec.path, variant=spec.variant, revision=spec.revision, dtype=dtype)
    for name in ("safety_checker", "watermark"):  # the model itself is measured
        if getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, None)
    if "prompt" not in accepted(type(pipeline)) and backbone(pipeline).config.get("num_class_embeds"):
        raise InputError(
            f"model: got {spec.path}, which is class-conditional, while {type(pipeline).__name__} takes no class; "
            "allowed: text-to-image or unconditional models; sample it with the code in its card"
        )
    if spec.unet:
        _load_unet(pipeline, spec.unet)
    if spec.lora:
        _load_lora(pipeline, spec.lora)
    if sampler and not (spec.scheduler or spec.spacing or spec.lora or _record(spec).get("method")):
        pipeline.scheduler = _of_protocol(pipeline, spec, sampler)
    else:
        pipeline.scheduler = scheduler_of(pipeline, spec)
    call_of(spec, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _of_protocol(pipeline, spec: ModelSpec, sampler: SamplerSpec):
    try:
        return scheduler_of(pipeline, dataclasses.replace(spec, scheduler=sampler.scheduler, spacing=sampler.spacing))
    except InputError as error:
        raise InputError(f"{error}, or name a scheduler in the SPEC: this is the protocol's sampler") from error


def call_of(spec: ModelSpec, pipeline) -> dict[str, Any]:
    """Returns the arguments of a pipeline's call besides prompt, steps and guidance. The image size is the SPEC's, else
    that of a student's training if it is not the pipeline's own.

    Raises:
        InputError: the pipeline does not take one of them.
    """
    side = spec.size or trained_side(spec, pipeline)
    wanted = {
        "size": {"height": side, "width": side} if side else {},
        "tokens": {"max_sequence_length": spec.tokens} if spec.tokens else {},
        "timesteps": {"timesteps": list(spec.timesteps)} if spec.timesteps else {},
    }
    known = inspect.signature(type(pipeline).__call__).parameters
    for name, arguments in wanted.items():
        if missing := [argument for argument in arguments if argument not in known]:
            raise InputError(
                f"{name}: got {getattr(spec, name)} for a {type(pipeline).__name__}, which takes no {missing[0]}; "
                "leave it out"
            )
    return {k: v for arguments in wanted.values() for k, v in arguments.items()}


def trained_side(spec: ModelSpec, pipeline) -> int | None:
    """Returns the image size that a student was trained at, from its export's record; None if it is the pipeline's."""
    side = _record(spec).get("resolution")
    return side if isinstance(side, int) and side != drawn_size(pipeline) else None


def _load_unet(pipeline, unet: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = getattr(pipeline, "unet", None)
    if network is None:
        raise InputError(f"unet: got {unet} for a {type(pipeline).__name__}, which has none; leave it out")
    try:
        network.load_state_dict(load_file(fetched(unet)))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"unet: got {unet}, whose weights do not fit the pipeline's UNet ({reason})") from error


def _load_lora(pipeline, lora: str) -> None:
    from stepdistill.export.adapters import load_whole

    check_lora(lora)
    load_whole(pipeline, fetched(lora))


def guidance_of(spec: ModelSpec, pipeline, default: float | None = None) -> float:
    """Returns a model's guidance scale.

    It is 1 (none) if the pipeline takes none, else the SPEC's if given. For a guidance-conditioned student (LCM's w) it
    is the middle of its training range, if recorded; for other students, stepdistill's and consistency models, it is 1.
    Otherwise it is `default` (the protocol's) if given, else the pipeline's own.

    Raises:
        InputError: the SPEC sets one, but the pipeline takes none.
    """
    if not takes_guidance(pipeline):
        if spec.guidance not in (None, 1.0):
            got = f"{spec.guidance:g} for a {type(pipeline).__name__} whose network takes none"
            raise InputError(f"guidance: got {got}; leave it out")
        return 1.0
    if spec.guidance is not None:
        return spec.guidance
    conditioned = is_guidance_conditioned(pipeline)
    if conditioned and (trained := _record(spec).get("guidance")):
        ends = trained if isinstance(trained, list) else [trained]
        return (float(ends[0]) + float(ends[-1])) / 2
    if not conditioned and (type(pipeline.scheduler).__name__ in UNGUIDED or _record(spec).get("method")):
        return 1.0
    parameter = inspect.signature(type(pipeline).__call__).parameters["guidance_scale"]
    return default if default is not None else float(parameter.default)


def even_of(spec: ModelSpec, pipeline) -> bool:
    """Whether a model is sampled at evenly spaced sigmas: as in the SPEC, else as in its export's record; never if the
    SPEC sets timesteps.

    Raises:
        InputError: the SPEC requests them, but the pipeline or its scheduler takes none, or it sets timesteps too.
    """
    from stepdistill.denoiser.families import takes_sigmas

    takes = takes_sigmas(pipeline, pipeline.scheduler)
    if spec.sigmas == "even" and not takes:
        got = f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__}"
        raise InputError(
            f"sigmas: got even for {got}, which take none; allowed: a flow with flow-euler or flow-lcm; leave it out"
        )
    if spec.sigmas == "even" and spec.timesteps:
        raise InputError("sigmas: got even with timesteps; allowed: one of the two; leave the other out")
    return takes and not spec.timesteps and (spec.sigmas or _record(spec).get("sigmas")) == "even"


def fingerprint(pipeline) -> str:
    """Returns 16 hex digits that identify a model by weights, LoRA and scheduler settings, whatever its path."""
    import torch

    digest = hashlib.sha256(type(pipeline).__name__.encode())
    for name, module in sorted(pipeline.components.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        for adapter, config in sorted((getattr(module, "peft_config", None) or {}).items()):
            digest.update(f"{name}.{adapter} r={config.r} alpha={config.lora_alpha}".encode())
            if others := _scalings(module, adapter, config.lora_alpha / config.r):
                digest.update(json.dumps(others, sort_keys=True).encode())
        digest.update(f"{name} {hashes.of_module(module)}".encode())
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    digest.update(json.dumps([type(pipeline.scheduler).__name__, scheduler], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _scalings(module, adapter: str, usual: float) -> dict[str, float]:
    """Returns LoRA scalings that differ from alpha / r, by layer: alphas of single layers, rsLoRA, or a weight."""
    held = {name: getattr(layer, "scaling", None) for name, layer in module.named_modules()}
    own = {name: scaling[adapter] for name, scaling in held.items() if isinstance(scaling, dict) and adapter in scaling}
    return {name: value for name, value in own.items() if value != usual}


def model_fields(spec: ModelSpec, sampler: Sampler) -> dict[str, Any]:
    """Returns a row's fields about the model and how it is sampled."""
    pipeline, record = sampler.pipeline, training_record(spec)
    student = record.get("teacher") or is_guidance_conditioned(pipeline)
    kind = "lora" if spec.lora else "student" if student else "teacher"
    return {
        "method": record.get("method") or kind, "spec": str(spec),
        "teacher": record.get("teacher") or (spec.path if spec.lora else None), "guidance": sampler.guidance,
        "scheduler": type(pipeline.scheduler).__name__, "spacing": sampler.spacing,
        "sigmas": "even" if sampler.even else None,
        "call": dict(sampler.call) or None,
        "dtype": str(backbone(pipeline).dtype).removeprefix("torch."),
        **training_fields(spec),
    }  # fmt: skip


def training_fields(spec: ModelSpec) -> dict[str, Any]:
    """Returns a row's fields about a student's training: what it cost, its seed, a hash of its other settings,
    its commit."""
    record = {} if spec.ready else _record(spec)
    settings = {k: v for k, v in record.items() if k not in ("out", "config", "seed", "train_seconds", "commit")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "train_seconds": record.get("train_seconds"), "train_seed": record.get("seed"),
        "train_settings": digest if "train_seconds" in record else None, "train_commit": record.get("commit"),
    }  # fmt: skip


def training_record(spec: ModelSpec) -> dict[str, Any]:
    """Returns method, teacher and train_seconds from the export or the catalogue; empty if there is no record."""
    if spec.ready:
        return {"method": ready(spec.ready).method, "teacher": ready(spec.ready).teacher, "train_seconds": None}
    record = _record(spec)
    return {k: record.get(k) for k in ("method", "teacher", "train_seconds")} if record else {}


def _record(spec: ModelSpec) -> dict[str, Any]:
    """Returns the config.json of the LoRA's folder, else of the pipeline's; for a kohya file, the one in its header."""
    if spec.lora and Path(spec.lora).is_file():
        from stepdistill.export.kohya import kohya_record

        return kohya_record(Path(spec.lora))
    try:
        file = beside(spec.lora, "config.json") if spec.lora else Path(spec.path) / "config.json"
    except OSError:  # the hub cannot be reached
        return {}
    return read_record(file) if file else {}
