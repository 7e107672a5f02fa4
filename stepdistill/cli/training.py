"""Flags of training runs: defaults, then the YAML file of --config, then the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

from stepdistill.cli.command import parse
from stepdistill.training.config import LoopConfig
from stepdistill.training.from_yaml import from_yaml
from stepdistill.training.plans import settings_file

C = TypeVar("C", bound=LoopConfig)


def parse_training(
    kind: type[C], description: str | None, argv: list[str] | None = None, default: C | None = None, *,
    prog: str | None = None,
) -> C:  # fmt: skip
    """Parses a command line into a configuration; unset flags come from `default` if given. --help exits with 0.

    Raises:
        InputError: an unknown flag or YAML key, or a value out of range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name == "--config":
            file = Path(value or (argv[i + 1] if i + 1 < len(argv) else ""))
            default = from_yaml(settings_file(file), kind, default)
    config = parse(kind, argv, prog=prog, description=description, default=default)
    config.check()
    return config
