"""Distils a pipeline into a latent consistency model (Luo et al. 2023): all weights, guidance-conditioned.

    accelerate launch train_scripts/train_lcm.py --teacher avatars --data avatars --out out/lcm --guidance 1.5 3

The same command again resumes. The export in <out>/export is a pipeline folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from stepdistill.cli.command import guard
from stepdistill.training.lcm import LCMConfig


@dataclass(frozen=True)
class FullConfig(LCMConfig):
    """Flags of a full student."""

    lora: bool = False
    """Train a LoRA adapter instead, which cannot be conditioned on guidance."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    embed_guidance: bool = True
    """Condition the student on its guidance, so that users choose guidance_scale at sampling."""


def main() -> None:
    """Reads the flags and trains."""
    from stepdistill.cli.training import parse_training
    from stepdistill.training.run import distil

    distil(parse_training(FullConfig, __doc__))


if __name__ == "__main__":
    sys.exit(guard(main))
