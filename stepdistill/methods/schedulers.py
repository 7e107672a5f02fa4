"""The diffusers scheduler that a student is exported with, made from its teacher's own configuration."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from stepdistill.denoiser.families import is_flow

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


def lcm_scheduler(teacher: Teacher, *, solver_steps: int, timestep_scaling: float):
    """diffusers' LCMScheduler for a student of this teacher; on a flow FlowMatchLCMScheduler with its shift."""
    from diffusers import FlowMatchLCMScheduler, LCMScheduler

    config = teacher.source.scheduler.config
    if is_flow(teacher.source.scheduler):
        own = {"shift": config.get("flow_shift", config.get("shift", 1.0))}
        return FlowMatchLCMScheduler(**_known(FlowMatchLCMScheduler, config) | own)
    own = {
        "original_inference_steps": solver_steps, "timestep_scaling": timestep_scaling, "timestep_spacing": "leading",
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 0,
    }  # fmt: skip
    return LCMScheduler(**_known(LCMScheduler, config) | own)


def _known(scheduler: type, config: dict) -> dict:
    """Those settings that a scheduler has."""
    return {name: config[name] for name in inspect.signature(scheduler).parameters if name in config}
