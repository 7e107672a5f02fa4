"""The settings shipped for the embedded teachers, and a function that runs any method's settings.

config = shipped("ladd", out=Path("out/ladd"), max_train_steps=100)     # train_scripts/configs/avatars_ladd_lora.yaml
exports = run(config, (1, 2, 4))                                        # {1: Path(...), 2: Path(...), 4: Path(...)}
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

from stepdistill.errors import InputError
from stepdistill.training.config import TrainConfig, from_yaml

PACKAGE = Path(__file__).parents[1]
FLAGS = {
    "lcm": ("stepdistill.training.lcm", "LCMConfig"),
    "progressive": ("stepdistill.training.progressive", "ProgressiveConfig"),
    "add": ("stepdistill.training.add", "ADDConfig"),
    "ladd": ("stepdistill.training.ladd", "LADDConfig"),
}


def shipped(method: str, teacher: str = "avatars", **changes) -> TrainConfig:
    """The shipped settings that distil an embedded teacher into a LoRA, with `changes` applied.

    Args:
        method: lcm, progressive, add or ladd. teacher: name of an embedded one.

    Raises:
        InputError: no settings ship for this combination.
    """
    name = f"{teacher.replace('-', '_')}_{method}_lora.yaml"
    for folder in (PACKAGE / "configs", PACKAGE.parent / "train_scripts" / "configs"):
        if method in FLAGS and (folder / name).is_file():
            module, kind = FLAGS[method]
            return dataclasses.replace(
                from_yaml(folder / name, getattr(importlib.import_module(module), kind)), **changes
            )
    raise InputError(f"settings: got {method} of {teacher}; allowed: {', '.join(FLAGS)} of an embedded teacher")


def run(config: TrainConfig, steps: tuple[int, ...]) -> dict[int, Path]:
    """Distils; returns the export folder for each step count, all the same except in progressive distillation.

    Raises:
        InputError: see `distil` and `distil_chain`.
    """
    from stepdistill.training.progressive import ProgressiveConfig, distil_chain
    from stepdistill.training.run import distil

    if isinstance(config, ProgressiveConfig):
        distil_chain(config)
        return {n: config.target(n) for n in steps}
    return dict.fromkeys(steps, distil(config))
