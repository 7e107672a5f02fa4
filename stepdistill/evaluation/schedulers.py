"""The schedulers of SPECs: what each name builds from a pipeline's configuration."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stepdistill.errors import InputError
from stepdistill.evaluation.places import beside

if TYPE_CHECKING:
    from stepdistill.evaluation.spec import ModelSpec

TRAILING = {"timestep_spacing": "trailing"}
SPACINGS = ("trailing", "leading", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# name: (diffusers class, options that override the configuration of the pipeline's scheduler)
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
NO_SAMPLE = ("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler")  # not written in diffusers
UNGUIDED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")


def scheduler_of(pipeline, spec: ModelSpec):
    """Returns the scheduler of a SPEC: the named one; else its LoRA export's, else the pipeline's.

    An export's scheduler takes precedence over the options in SCHEDULERS for the same class. With `spacing` the
    scheduler is from_config(own, timestep_spacing=...), as in model cards, without those options. `prediction` sets its
    prediction_type, whatever else does.

    Raises:
        InputError: a flow scheduler for another process or the reverse; a spacing that would have no effect; a
            prediction that the scheduler does not know.
    """
    import diffusers

    check_process(spec, type(pipeline.scheduler).__name__, pipeline.scheduler.config)
    name, options = SCHEDULERS[spec.scheduler] if spec.scheduler else (None, {})
    exported = _exported(spec.lora)
    own = exported if exported is not None and name in (None, type(exported).__name__) else pipeline.scheduler
    kind = getattr(diffusers, name) if name else type(own)
    predicts = {}
    if spec.prediction:
        check_prediction(kind, own.config, spec)
        predicts = {"prediction_type": spec.prediction}
    if spec.spacing:
        check_spacing(kind, spec)
        return kind.from_config(own.config, timestep_spacing=spec.spacing, **predicts)
    if name is None or own is exported or (name == type(own).__name__ and name in UNGUIDED):
        return kind.from_config(own.config, **predicts) if predicts else own
    config = {k: v for k, v in own.config.items() if k not in ("timestep_spacing", "final_sigmas_type")}
    return kind.from_config(config, **options, **predicts)


def check_process(spec: ModelSpec, kind: str, config: Mapping[str, Any]) -> None:
    """Checks that a SPEC's scheduler, if it names one, is for the process of a pipeline's own.

    Args:
        kind: class name of the pipeline's scheduler. config: its configuration.

    Raises:
        InputError: one is a flow's, the other is not.
    """
    from stepdistill.denoiser.families import flows

    flow = flows(kind, config)
    if spec.scheduler and (spec.scheduler in FLOWS) != flow:
        allowed = ", ".join(FLOWS if flow else (name for name in SCHEDULERS if name not in FLOWS))
        raise InputError(
            f"scheduler: got {spec.scheduler} for a {'flow' if flow else 'diffusion'} model; allowed: {allowed}"
        )


def has_spacing(kind: type) -> bool:
    """Whether a scheduler class uses a timestep_spacing. LCM's and TCD's have one in their configuration but step
    through the times they were distilled for."""
    return kind.__name__ not in UNGUIDED and "timestep_spacing" in inspect.signature(kind.__init__).parameters


def check_spacing(kind: type, spec: ModelSpec) -> None:
    """Checks that a scheduler class uses a SPEC's spacing.

    Raises:
        InputError: it does not, or the SPEC names the times themselves.
    """
    why = None
    if spec.timesteps:
        why = f"timesteps={'+'.join(map(str, spec.timesteps))}, which are the times"
    elif not has_spacing(kind):
        why = f"{kind.__name__}, which has times of its own"
    if why:
        raise InputError(f"spacing: got {spec.spacing} for {why}; leave it out")


def check_prediction(kind: type, config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Checks that a scheduler class can step from what a SPEC says the network predicts.

    Args:
        config: of the scheduler that it takes the place of.

    Raises:
        InputError: it cannot, or that one is a flow's.
    """
    if config.get("prediction_type") not in PREDICTIONS:
        raise InputError(
            f"prediction: got {spec.prediction} for a flow model ({kind.__name__}), which predicts its velocity; "
            "leave it out"
        )
    if spec.prediction == "sample" and kind.__name__ in NO_SAMPLE:
        able = [name for name, (own, _) in SCHEDULERS.items() if own not in NO_SAMPLE and name not in FLOWS]
        raise InputError(
            f"prediction: got sample for {kind.__name__}, which does not know it; allowed: scheduler={'|'.join(able)}"
        )


def _exported(lora: str | None):
    """Loads the scheduler in a LoRA's export; None if it has none."""
    import diffusers

    file = beside(lora, "scheduler/scheduler_config.json") if lora else None
    if file is None:
        return None
    return getattr(diffusers, json.loads(file.read_text())["_class_name"]).from_pretrained(file.parent)
