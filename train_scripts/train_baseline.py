"""Runs a baseline: classifier, language-model or architecture distillation, on as many processes as are launched.

    accelerate launch train_scripts/train_baseline.py hinton --out out/hinton
    accelerate launch --num_processes 2 train_scripts/train_baseline.py hinton --quick

`stepdistill baselines list` names them. The same command again resumes. The table is <out>/results.json.
"""

from __future__ import annotations

import sys

from stepdistill.cli.command import guard


def main() -> None:
    """Reads the name and the flags, and runs."""
    from stepdistill.cli import baselines

    baselines.main(["run", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(guard(main))
