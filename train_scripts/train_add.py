"""Distils a pipeline by adversarial diffusion distillation, ADD (Sauer et al. 2023): a LoRA, or all weights.

    accelerate launch train_scripts/train_add.py --config train_scripts/configs/avatars_add_lora.yaml --out out/add
    accelerate launch train_scripts/train_add.py --config train_scripts/configs/sdxl_add_lora.yaml --data my/images

The discriminator judges decoded images through a frozen image network (--feature-network). The same command again
resumes. The export is in <out>/export.
"""

from __future__ import annotations

import sys

from stepdistill.cli.command import guard


def main() -> None:
    """Reads the flags and trains."""
    from stepdistill.cli.training import parse_training
    from stepdistill.training.add import ADDConfig
    from stepdistill.training.run import distil

    distil(parse_training(ADDConfig, __doc__))


if __name__ == "__main__":
    sys.exit(guard(main))
