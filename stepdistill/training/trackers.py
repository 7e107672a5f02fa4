"""A run's metrics: to metrics.jsonl always, to tensorboard and wandb if requested."""

from __future__ import annotations

import json
import math
import os
import uuid
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
        if names := [str(tracker) for tracker in accelerator.log_with]:
            flat = {k: v if isinstance(v, int | float | str | bool) else json.dumps(v) for k, v in record.items()}
            wandb = wandb_run(out) if "wandb" in names and accelerator.is_main_process else {}
            project = os.environ.get("WANDB_PROJECT") or "stepdistill"
            accelerator.init_trackers(project, config=flat, init_kwargs={"wandb": wandb})
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


def wandb_run(out: Path) -> dict[str, str]:
    """The arguments of wandb.init with which a run that resumes goes on as the same run there, by the id that it keeps
    in <out>/wandb.json. wandb ignores the lines that it has already, which are the same."""
    file = out / "wandb.json"
    if not (file.exists() and (out / "metrics.jsonl").exists()):  # a run that never logged is none, see folder.claim
        write(file, json.dumps({"id": uuid.uuid4().hex}) + "\n")
    return {"id": json.loads(file.read_text())["id"], "resume": "allow", "name": str(out)}


def _update_of(line: str) -> float:
    try:
        return json.loads(line)["update"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a truncated line
