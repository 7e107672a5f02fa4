"""The schedulers of SPECs: what each name builds from a pipeline's own configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from stepdistill.evaluation.spec import ModelSpec

TRAILING = {"timestep_spacing": "trailing"}
SPACINGS = ("trailing", "leading", "linspace")
# name: (diffusers class, what is set on top of the pipeline's own scheduler configuration).
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


def scheduler_of(pipeline, spec: ModelSpec):
    """The scheduler of a SPEC: the named one; else its LoRA export's, else the pipeline's own.

    With `spacing` it is what model cards write, from_config(own, timestep_spacing=...), and nothing of SCHEDULERS.

    Raises:
        InputError: one for flows asked of another process, or the other way round.
    """
    import diffusers

    from stepdistill.denoiser.families import is_flow

    own = Path(spec.lora or "") / "scheduler"
    exported = (
        json.loads((own / "scheduler_config.json").read_text()) if (own / "scheduler_config.json").is_file() else None
    )
    wanted = SCHEDULERS[spec.scheduler][0] if spec.scheduler else None
    if spec.lora and exported and wanted in (None, exported["_class_name"]):
        return getattr(diffusers, exported["_class_name"]).from_pretrained(own)
    if spec.spacing:
        kind = getattr(diffusers, wanted) if wanted else type(pipeline.scheduler)
        return kind.from_config(pipeline.scheduler.config, timestep_spacing=spec.spacing)
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
