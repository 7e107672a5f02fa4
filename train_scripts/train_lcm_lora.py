"""Distils a pipeline into an LCM-LoRA (Luo et al. 2023) that `pipe.load_lora_weights` loads.

    accelerate launch train_scripts/train_lcm_lora.py --teacher avatars --data avatars --out out/lcm-lora --guidance 3
    accelerate launch train_scripts/train_lcm_lora.py --config train_scripts/configs/sd15_lcm_lora.yaml --data my/images

The same command again resumes. The export is in <out>/export.
"""

from __future__ import annotations

import sys

from stepdistill.cli.command import guard


def main() -> None:
    """Reads the flags and trains."""
    from stepdistill.cli.training import parse_training
    from stepdistill.training.lcm import LCMConfig
    from stepdistill.training.run import distil

    distil(parse_training(LCMConfig, __doc__))


if __name__ == "__main__":
    sys.exit(guard(main))
