"""Distils a teacher of your own: what the scripts of train_scripts/ do, from an installed package too.

    stepdistill train lcm-lora --teacher avatars --data avatars --out out/lcm-lora --guidance 3
    accelerate launch -m stepdistill train ladd --config sdxl_ladd_lora --data prompts.txt --out out/sdxl

--config takes a YAML file, or the name of settings that ship. The same command again resumes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module

from stepdistill.cli.training import parse_training
from stepdistill.errors import InputError
from stepdistill.training.config import TrainConfig

# method: (module in stepdistill.training, its flags, what it does)
METHODS = {
    "lcm-lora": ("lcm", "LCMConfig", "latent consistency (Luo et al. 2023): a LoRA"),
    "lcm": ("lcm", "FullLCMConfig", "latent consistency (Luo et al. 2023): all weights, guidance-conditioned"),
    "progressive": ("progressive", "ProgressiveConfig",
                    "progressive (Salimans and Ho 2022; Meng et al. 2023): repeated halving of the steps"),
    "add": ("add", "ADDConfig", "adversarial (Sauer et al. 2023): the discriminator judges decoded images"),
    "ladd": ("ladd", "LADDConfig", "latent adversarial (Sauer et al. 2024): the discriminator judges noised latents"),
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Runs `stepdistill train` with these arguments."""
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        methods = "\n".join(f"  {method:<12} {what}" for method, (_, _, what) in METHODS.items())
        print(f"{__doc__}\nMethods; `stepdistill train METHOD --help` lists the flags of one:\n{methods}")
        return
    from stepdistill.training.plans import run

    run(flags(name, rest))


def flags(name: str, argv: Sequence[str]) -> TrainConfig:
    """Parses the flags of a method.

    Raises:
        InputError: no such method, an unknown flag or YAML key, or a value out of range.
    """
    name = name.replace("_", "-")
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {near[0]}?" if near else "; the method comes first" if name.startswith("-") else ""
        raise InputError(f"train: got {name or 'no method'}; allowed: {', '.join(METHODS)}{hint}")
    module, kind, what = METHODS[name]
    description = f"Distils a pipeline: {what}.\n\nThe same command again resumes."
    config = getattr(import_module(f"stepdistill.training.{module}"), kind)
    return parse_training(config, description, list(argv), prog=f"stepdistill train {name}")
