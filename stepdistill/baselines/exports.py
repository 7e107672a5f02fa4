"""Exports of trained networks, written anew only where training has gone on since."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from stepdistill import files


def refresh(target: Path, trained: Path, write: Callable[[Path], object]) -> None:
    """Has `write` export to `target`, unless that holds the weights with which the training in `trained` ended.

    Args:
        trained: the folder of a finished training. write: takes `target`, and replaces it only when all is written.
            <target>.json beside it says after how many updates.
    """
    update = updates(trained / "done.json")
    mark = target.with_name(f"{target.name}.json")
    if not target.is_dir() or updates(mark) != update:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target)
        files.write(mark, json.dumps({"update": update}) + "\n")


def updates(file: Path) -> int | None:
    """The updates that such a file, or a training's done.json, tells of; None if there is none."""
    try:
        return json.loads(file.read_text())["update"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
