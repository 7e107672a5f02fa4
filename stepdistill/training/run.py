"""From a configuration to a distilled student: what the training scripts and the demo share."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.training import folder
from stepdistill.training.config import PipelineConfig, TrainConfig
from stepdistill.training.export import push_rest

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

DRY = 4  # samples of a dry run


def distil(config: TrainConfig) -> Path:
    """Loads the teacher and the data, trains and exports; a finished run returns at once.

    Returns:
        The export folder.

    Raises:
        InputError: a flag, the teacher, the data or the folder will not do.
    """
    from stepdistill.training.trainer import Trainer

    method = config.method()
    state = begin(config)
    if (done := folder.finished(config)) is not None:
        state.print(f"done already: {done}")
        if state.is_main_process:
            push_rest(config, done)
        return done
    teacher = open_teacher(config, state.device)
    with tempfile.TemporaryDirectory() as beside:
        return Trainer(method, teacher, open_samples(config, teacher, Path(beside)), config).fit()


def begin(config: TrainConfig):
    """Checks flags and folder before hours of encoding, not after; returns accelerate's PartialState."""
    from accelerate import PartialState

    from stepdistill.training import sharding
    from stepdistill.training.processes import on_cpu

    config.check()
    _ = config.samples  # that there are any
    sharding.check(config)
    with sharding.kept_from_accelerate():
        state = PartialState(cpu=on_cpu())
    folder.claim(config, state.num_processes, write=False)
    return state


def open_teacher(config: PipelineConfig, device) -> Teacher:
    """The teacher, found fit for the run, at the run's picture size.

    Its network is loaded in what it is kept in. Text encoders and autoencoder are float32: what they say is cached for
    runs of any precision, under a key of their weights.
    """
    from stepdistill.data.build import picture_size
    from stepdistill.denoiser.load import load_teacher

    files = {"variant": config.variant, "revision": config.revision}
    teacher = load_teacher(config.teacher, **files, backbone_dtype=config.frozen_type, device=device)
    config.check_teacher(teacher)
    return teacher.resize(picture_size(teacher, config.resolution))


def open_samples(config: TrainConfig, teacher: Teacher, beside: Path):
    """The cached samples; one process builds them, the others wait at its lock, for any time.

    Args:
        beside: where a dry run keeps the few it takes.
    """
    from stepdistill.data.cache import open_data

    settings = {
        "resolution": config.resolution, "seed": config.seed, "synthetic_guidance": config.data_guidance,
        "half": config.half, "precision": config.half_type,
    }  # fmt: skip
    dry = {"limit": DRY, "cache_dir": beside} if config.dry_run else {}
    return open_data(config.samples, teacher, **settings, **dry)
