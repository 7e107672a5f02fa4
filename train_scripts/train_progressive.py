"""Distils a pipeline progressively (Salimans and Ho 2022; Meng et al. 2023), by repeated halving of its steps.

    accelerate launch train_scripts/train_progressive.py --teacher avatars --data avatars --out out/halved --guidance 4
    accelerate launch train_scripts/train_progressive.py --config train_scripts/configs/sd15_progressive_lora.yaml \\
        --data my/images

One command runs the whole chain from --start-steps to --end-steps: guidance first, then the halvings, each from
the previous export. The same command again resumes. The exports are in <out>/steps-16, <out>/steps-8, ...
"""

from __future__ import annotations

import sys

from stepdistill.cli.command import guard


def main() -> None:
    """Reads the flags and trains."""
    from stepdistill.cli.training import parse_training
    from stepdistill.training.progressive import ProgressiveConfig, distil_chain

    distil_chain(parse_training(ProgressiveConfig, __doc__))


if __name__ == "__main__":
    sys.exit(guard(main))
