"""The step distillations that follow a pruning: LCM, or LADD started from its student."""

from __future__ import annotations

import dataclasses
import importlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState

from stepdistill import files
from stepdistill.baselines.exports import refresh, updates
from stepdistill.baselines.learner import check_may_train
from stepdistill.errors import InputError
from stepdistill.export.fused import save_fused
from stepdistill.training.config import TrainConfig
from stepdistill.training.folder import finished
from stepdistill.training.from_yaml import from_yaml
from stepdistill.training.plans import FLAGS, settings_file, shipped
from stepdistill.training.run import distil

if TYPE_CHECKING:
    from stepdistill.baselines.architecture.prune_then_steps import PruneThenStepsConfig

CHAIN = {"lcm": ("lcm",), "ladd": ("lcm", "ladd")}  # an adversarial run this short needs a distilled start


def settings(
    config: PruneThenStepsConfig, name: str, teacher: str, data: str | None, out: Path, start: Path | None,
    seed: int = 0,
) -> TrainConfig:  # fmt: skip
    """The flags of a step distillation.

    Args:
        name: lcm or ladd. start: the student that ladd starts from.

    Raises:
        InputError: there are none for this teacher.
    """
    flags = importlib.import_module(FLAGS[name][0])
    file, script = getattr(config, name), {"lcm": "train_lcm_lora.py", "ladd": "train_ladd.py"}[name]
    changes = {
        "teacher": teacher, "data": data, "out": out, "seed": seed, "max_train_steps": config.step_updates,
        "half": config.half,
    }  # fmt: skip
    if name == "ladd":  # the blocks it names may have been removed: four of those left
        changes |= {"start": start, "blocks": ()}
    if file is None and config.teacher != "avatars":
        raise InputError(
            f"{name}: got none for {config.teacher}; allowed: a YAML file of {script}'s flags that fit it, as "
            f"sd15_{name}_lora, which ships"
        )
    known = shipped(name) if file is None else from_yaml(settings_file(file), getattr(flags, FLAGS[name][1]))
    return dataclasses.replace(known, **changes | {"variant": None, "revision": None} | config.files(teacher))


def fewer_steps(config: PruneThenStepsConfig, path: str, data: str, out: Path, seed: int) -> tuple[Path, float]:
    """Distils the steps of a pipeline; returns the student, a pipeline with the adapter fused, and the seconds.

    Raises:
        InputError: `out` is of this pipeline before it was trained further.
    """
    lora, fused = None, out / "fused"
    _check_same(Path(path), out)
    for name in CHAIN[config.distiller]:
        wanted = settings(config, name, path, data, out / name, lora, seed)
        check_may_train(wanted, finished(wanted))
        lora = distil(wanted)
    state = PartialState()
    if state.is_main_process:
        write = partial(save_fused, lora, teacher=path, **config.files(path))
        refresh(fused, lora.parent, write)
    state.wait_for_everyone()
    return fused, json.loads((lora.parent / "done.json").read_text())["seconds"]


def _check_same(pruned: Path, out: Path) -> None:
    """Notes after how many updates a pruned pipeline is distilled in `out`, and raises if these were others before."""
    now, mark = updates(pruned.with_name(f"{pruned.name}.json")), out / "network.json"
    if now is None:  # the teacher
        return
    if (before := updates(mark)) not in (None, now):
        raise InputError(
            f"--out: got {out}, distilled from a network after {before} updates, of which there are {now} now; "
            "allowed: the same network; remove that folder, or give another --out"
        )
    if PartialState().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        files.write(mark, json.dumps({"update": now}) + "\n")
