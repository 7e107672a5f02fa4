"""The settings that ship, found by name, and a function that runs any method's settings.

config = shipped("ladd", out=Path("out/ladd"), max_train_steps=100)     # train_scripts/configs/avatars_ladd_lora.yaml
exports = run(config, (1, 2, 4))                                        # {1: Path(...), 2: Path(...), 4: Path(...)}
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from pathlib import Path

from stepdistill.errors import InputError
from stepdistill.training.config import TrainConfig
from stepdistill.training.from_yaml import from_yaml

PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "train_scripts" / "configs")  # in a wheel, in a checkout
FLAGS = {
    "lcm": ("stepdistill.training.lcm", "LCMConfig"),
    "progressive": ("stepdistill.training.progressive", "ProgressiveConfig"),
    "add": ("stepdistill.training.add", "ADDConfig"),
    "ladd": ("stepdistill.training.ladd", "LADDConfig"),
}


def settings_files() -> dict[str, Path]:
    """The settings files that ship, of methods and baselines, by name without .yaml."""
    folders = [folder / part for folder in FOLDERS for part in (".", "baselines")]
    found = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    found.pop("avatars_teacher", None)  # of another script
    return found


def settings_file(name: Path) -> Path:
    """The file that --config names: a path, or settings that ship, with or without .yaml.

    Raises:
        InputError: a name alone, of no file here and of none that ships.
    """
    if name.exists() or len(name.parts) != 1:  # reading a path that is not there reports it
        return name
    ships = settings_files()
    stem = name.name.removesuffix(".yaml")
    if stem not in ships:
        near = ", ".join(difflib.get_close_matches(stem, ships, 4, cutoff=0.3))
        raise InputError(
            f"--config: got {name}, which is neither a file here nor settings that ship; allowed: a YAML file, or one "
            f"of {near or ', '.join(ships)}"
        )
    return ships[stem]


def shipped(method: str, teacher: str = "avatars", **changes) -> TrainConfig:
    """The shipped settings that distil an embedded teacher into a LoRA, with `changes` applied.

    Args:
        method: lcm, progressive, add or ladd. teacher: name of an embedded one.

    Raises:
        InputError: no settings ship for this combination.
    """
    file = settings_files().get(f"{teacher.replace('-', '_')}_{method}_lora")
    if method not in FLAGS or file is None:
        raise InputError(f"settings: got {method} of {teacher}; allowed: {', '.join(FLAGS)} of an embedded teacher")
    module, kind = FLAGS[method]
    return dataclasses.replace(from_yaml(file, getattr(importlib.import_module(module), kind)), **changes)


def run(config: TrainConfig, steps: tuple[int, ...] = ()) -> dict[int, Path]:
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
