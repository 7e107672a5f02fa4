"""Distils a pipeline into a latent consistency model (Luo et al. 2023): every weight trained, told its guidance weight.

    accelerate launch train_scripts/train_lcm.py --teacher avatars --data avatars --out out/lcm --guidance 1.5 3

The same command again resumes. The export in <out>/export is a pipeline folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from stepdistill.cli._run import guard
from stepdistill.training.lcm import LCMConfig


@dataclass(frozen=True)
class FullConfig(LCMConfig):
    """Flags of a full student."""

    lora: bool = False
    learning_rate: float = 1e-5
    embed_guidance: bool = True


def main() -> None:
    """Reads the flags and trains."""
    from stepdistill.training.config import parse
    from stepdistill.training.lcm import distil

    print(distil(parse(FullConfig, __doc__)))


if __name__ == "__main__":
    sys.exit(guard(main))
