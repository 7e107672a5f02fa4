"""Distils a pipeline into a latent consistency model (Luo et al. 2023): all weights, guidance-conditioned.

    accelerate launch train_scripts/train_lcm.py --teacher avatars --data avatars --out out/lcm --guidance 1.5 3

The same command again resumes. The export in <out>/export is a pipeline folder.
"""

from __future__ import annotations

import sys

from stepdistill.cli.command import guard


def main() -> None:
    """Reads the flags and trains."""
    from stepdistill.cli.training import parse_training
    from stepdistill.training.lcm import FullLCMConfig
    from stepdistill.training.run import distil

    distil(parse_training(FullLCMConfig, __doc__))


if __name__ == "__main__":
    sys.exit(guard(main))
