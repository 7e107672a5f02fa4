"""A run's metrics: to metrics.jsonl always, to tensorboard and wandb if requested."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from stepdistill.files import write


class Metrics:
    """The log of a run. Only the main process writes.

    Args:
        out: the run's folder. accelerator: created with log_with, for the trackers besides the file.
        update: where the run resumes; later lines of an interrupted run are dropped.
    """

    def __init__(self, out: Path, accelerator: Accelerator, record: dict, update: int) -> None:
        self.path, self.accelerator = out / "metrics.jsonl", accelerator
        if accelerator.log_with:
            flat = {k: v if isinstance(v, int | float | str | bool) else json.dumps(v) for k, v in record.items()}
            accelerator.init_trackers("stepdistill", config=flat)
        if accelerator.is_main_process and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _update_of(line) <= update]
            write(self.path, "".join(line + "\n" for line in lines))

    def log(self, update: int, values: dict[str, float]) -> None:
        """Writes one line, and logs to the trackers."""
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps({"update": update, **values}) + "\n")
        self.accelerator.log(values, step=update)

    def picture(self, update: int, name: str, picture: Image.Image) -> None:
        """Logs an image, to the trackers only. Called by the main process."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(picture)[None]}, step=update, dataformats="NHWC")
            else:
                tracker.log_images({name: [picture]}, step=update)

    def close(self) -> None:
        """Closes the trackers; without `end_training`, which also destroys the process group."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _update_of(line: str) -> float:
    try:
        return json.loads(line)["update"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a truncated line
