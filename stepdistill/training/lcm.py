"""A latent consistency run from its configuration: what train_lcm.py, train_lcm_lora.py and the demo share."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stepdistill.errors import InputError
from stepdistill.methods.consistency import LatentConsistency
from stepdistill.training.config import TrainConfig

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

DRY = 4  # samples of a dry run


@dataclass(frozen=True)
class LCMConfig(TrainConfig):
    """Flags of latent consistency distillation."""

    guidance: tuple[float, ...] = (4.0, 16.0)
    """The teacher's guidance scale: one value, or a range drawn from (1 is none; the paper's w is one less)."""
    solver_steps: int = 50
    """Points on the teacher's path."""
    loss: Literal["huber", "l2"] = "huber"
    """Distance between the two ends."""
    huber_c: float = 1e-3
    """Below this difference the Huber loss is quadratic, above it linear."""
    timestep_scaling: float = 10.0
    """How steeply the boundary condition is left; LCMScheduler's 10."""
    embed_guidance: bool = False
    """Tell a full student its guidance weight (--no-lora only)."""

    def method(self) -> LatentConsistency:
        """The method these flags describe."""
        if len(self.guidance) not in (1, 2):
            raise InputError(f"guidance: got {len(self.guidance)} values; allowed: one, or two for a range")
        if self.embed_guidance and self.lora:
            raise InputError("embed_guidance: got it for a LoRA; allowed: a full student (--no-lora, or train_lcm.py)")
        return LatentConsistency(
            guidance_min=self.guidance[0], guidance_max=self.guidance[-1], solver_steps=self.solver_steps,
            loss_type=self.loss, huber_c=self.huber_c, timestep_scaling=self.timestep_scaling,
            embed_guidance=self.embed_guidance,
        )  # fmt: skip


def check_teacher(config: LCMConfig, method: LatentConsistency, teacher: Teacher) -> None:
    """Raises InputError where a teacher cannot be distilled as the flags say; called before its data are encoded."""
    import torch

    from stepdistill.training.roles import adaptable, tellable

    if config.lora:
        adaptable(teacher.denoiser.backbone, config.target_modules)
    elif method.embed_guidance:
        tellable(teacher.denoiser.backbone)
    if teacher.vae is None and method.guidance_max > 1:
        raise InputError(
            f"guidance: got {method.guidance_max:g} with {teacher.path}, a pixel model without text; allowed: 1; give "
            "--guidance 1"
        )
    method.times(torch.zeros(1, dtype=torch.long), teacher.denoiser.schedule)


def distil(config: LCMConfig) -> Path:
    """Loads the teacher and the data, trains and exports; a finished run returns at once.

    Returns:
        The export folder.

    Raises:
        InputError: a flag, the teacher, the data or the folder will not do.
    """
    config.check()
    method = config.method()
    from accelerate import PartialState

    from stepdistill.data.build import picture_size
    from stepdistill.data.cache import open_data
    from stepdistill.denoiser.load import load_teacher
    from stepdistill.training import folder
    from stepdistill.training.export import push_rest
    from stepdistill.training.processes import on_cpu, refuse_sharding
    from stepdistill.training.trainer import Trainer

    refuse_sharding()
    state = PartialState(cpu=on_cpu())
    folder.claim(config, state.num_processes, write=False)  # before hours of encoding, not after
    if (done := folder.finished(config)) is not None:
        state.print(f"done already: {done}")
        if state.is_main_process:
            push_rest(config)
        return done
    teacher = load_teacher(config.teacher, variant=config.variant, revision=config.revision, device=state.device)
    check_teacher(config, method, teacher)
    teacher.resize(picture_size(teacher, config.resolution))
    guidance = (config.guidance[0] + config.guidance[-1]) / 2
    settings = {"resolution": config.resolution, "seed": config.seed, "synthetic_guidance": guidance}
    if config.dry_run:
        with tempfile.TemporaryDirectory() as beside:
            data = open_data(config.data, teacher, limit=DRY, cache_dir=beside, **settings)
            return Trainer(method, teacher, data, config).fit()
    data = open_data(config.data, teacher, **settings)  # one process builds; the others wait at its lock, for any time
    return Trainer(method, teacher, data, config).fit()
