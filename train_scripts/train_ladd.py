"""Distils a pipeline by latent adversarial diffusion distillation, LADD (Sauer et al. 2024): a LoRA, or all weights.

    accelerate launch train_scripts/train_ladd.py --teacher avatars --data avatars --out out/ladd
    accelerate launch train_scripts/train_ladd.py --config train_scripts/configs/sd35_ladd_lora.yaml --data prompts.txt

The discriminator judges noised latents through the teacher (--blocks). Given only prompts, the teacher first generates
the data. The same command again resumes. The export is in <out>/export.
"""

from __future__ import annotations

import sys

from stepdistill.cli.command import guard


def main() -> None:
    """Reads the flags and trains."""
    from stepdistill.cli.training import parse_training
    from stepdistill.training.ladd import LADDConfig
    from stepdistill.training.run import distil

    distil(parse_training(LADDConfig, __doc__))


if __name__ == "__main__":
    sys.exit(guard(main))
