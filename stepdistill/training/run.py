"""From a configuration to a distilled student, for the training scripts and the demo."""

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
        InputError: a flag, the teacher, the data or the folder is unsuitable.
    """
    from stepdistill.training.trainer import Trainer

    method = config.method()
    state = begin(config)
    if (done := folder.finished(config)) is not None:
        state.print(f"already done: {done}")
        if state.is_main_process:
            push_rest(config, done)
        return done
    teacher = open_teacher(config, state.device)
    with tempfile.TemporaryDirectory() as beside:
        return Trainer(method, teacher, open_samples(config, teacher, Path(beside)), config).fit()


def begin(config: TrainConfig):
    """Checks flags and folder before, not after, hours of encoding; returns accelerate's PartialState."""
    from stepdistill.training import sharding, zero
    from stepdistill.training.processes import world

    config.check()
    _ = config.samples  # raises if there are none
    sharding.check(config)
    zero.check(config)
    with sharding.kept_from_accelerate():
        state = world()
    folder.claim(config, state.num_processes, write=False)
    return state


def open_teacher(config: PipelineConfig, device) -> Teacher:
    """Loads the teacher, checks it against the flags, and sets the run's image size.

    Its network is loaded in the dtype it is kept in. Text encoders and autoencoder are float32: their outputs are
    cached for runs of any precision, keyed by their weights.
    """
    from stepdistill.data.cache import size_of
    from stepdistill.denoiser.load import load_teacher

    files = {"variant": config.variant, "revision": config.revision}
    teacher = load_teacher(config.teacher, **files, backbone_dtype=config.frozen_type, device=device)
    config.check_teacher(teacher)
    return teacher.resize(size_of(config.data, teacher, config.resolution))


def open_samples(config: TrainConfig, teacher: Teacher, beside: Path):
    """Opens the cached samples; if there are none, the run's processes share the work of building them.

    Args:
        beside: folder for the few samples of a dry run.
    """
    from stepdistill.data.cache import open_data
    from stepdistill.processes import Processes
    from stepdistill.training.processes import world

    settings = {
        "resolution": config.resolution, "seed": config.seed, "synthetic_guidance": config.data_guidance,
        "half": config.half, "precision": config.half_type,
    }  # fmt: skip
    if config.dry_run:  # each process on its own
        return open_data(config.samples, teacher, **settings, limit=DRY, cache_dir=beside)
    return open_data(config.samples, teacher, **settings, team=Processes.found(world().device.type))
