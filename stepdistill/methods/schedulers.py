"""The diffusers scheduler that a student is exported with, made from its teacher's own configuration."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from stepdistill.denoiser.families import KINDS, family_of, is_flow
from stepdistill.prediction import Kind

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


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


def ddim_scheduler(teacher: Teacher, *, kind: Kind, steps: int):
    """A diffusers scheduler that takes `steps` evenly spaced DDIM steps from the noisy end to the clean one.

    By default DDIMScheduler with trailing spacing. It steps by T // steps timesteps on a grid spaced by T / steps, so
    if steps does not divide T (16 or 32 steps of 1000), each step lands one timestep off the start of the next. Then
    first-order DPMSolverMultistepScheduler is returned, which is DDIM too (Lu et al. 2022b) and has no such offset.

    On a flow, a pipeline that requests evenly spaced times (Flux) keeps its own FlowMatchEulerDiscreteScheduler. Others
    (SD3, Sana) leave the times to the scheduler, whose last ones are 1/1000 and 0: the last step is wasted, and the
    grid of 2N does not contain that of N. They get DPMSolverMultistepScheduler too, with the teacher's shift; its times
    are evenly spaced from 999/1000.

    Args:
        kind: the student's prediction type.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    config = teacher.source.scheduler.config
    order_one = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    if is_flow(teacher.source.scheduler):
        if family_of(teacher.source).flow_spacing == "trailing":
            return FlowMatchEulerDiscreteScheduler(**_known(FlowMatchEulerDiscreteScheduler, config))
        own = {"use_flow_sigmas": True, "flow_shift": teacher.denoiser.grid.shift}
        return DPMSolverMultistepScheduler(**order_one, **own, prediction_type="flow_prediction")
    own = {name: config[name] for name in BETAS if name in config}
    own |= {"timestep_spacing": "trailing", "prediction_type": {k: name for name, k in KINDS.items()}[kind]}
    own |= {"steps_offset": 1}  # no effect here, but StableDiffusionPipeline warns about any other value
    if config.get("num_train_timesteps", 1000) % steps:
        return DPMSolverMultistepScheduler(**order_one, **own)
    return DDIMScheduler(**own, clip_sample=False, set_alpha_to_one=True)


def _known(scheduler: type, config: dict) -> dict:
    """The settings that a scheduler accepts."""
    return {name: config[name] for name in inspect.signature(scheduler).parameters if name in config}
