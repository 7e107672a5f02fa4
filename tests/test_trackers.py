"""Figures and grids reach the trackers, which do not end the process group; wandb sees one run, resumed or not."""

from __future__ import annotations

import importlib.machinery
import json
import re
import sys
import types

import accelerate.tracking
import pytest
from test_resume import stop_at, trainer


class Tracker:
    """A stand-in for one of accelerate's trackers."""

    def __init__(self, name: str) -> None:
        self.name, self.pictures, self.finished = name, [], 0

    def log_images(self, values, step, **options):
        self.pictures.append((step, values["validation"], options))

    def finish(self):
        self.finished += 1


def test_trackers_get_the_grids_and_are_ended_without_the_process_group(settings, monkeypatch):
    run = trainer(settings, validate_every=2)
    run.accelerator.trackers = [Tracker("tensorboard"), Tracker("wandb")]
    monkeypatch.setattr(run.accelerator, "log", lambda *_, **__: None)
    monkeypatch.setattr(run.accelerator, "end_training", lambda: pytest.fail("ended the process group"))
    run.fit()
    tensorboard, wandb = run.accelerator.trackers
    assert [step for step, _, _ in tensorboard.pictures] == [step for step, _, _ in wandb.pictures] == [2, 4]
    _, picture, options = tensorboard.pictures[0]
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and options == {"dataformats": "NHWC"}
    assert wandb.pictures[0][1][0].size == picture.shape[2:0:-1]
    assert (tensorboard.finished, wandb.finished) == (1, 1)


def test_tensorboard_holds_figures_and_grids(settings):
    pytest.importorskip("tensorboard", reason="tensorboard, of the extra `trackers`, is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(settings, validate_every=2, trackers=("tensorboard",)).fit()
    events = EventAccumulator(str(settings.out / "stepdistill"))
    events.Reload()
    assert [event.step for event in events.Scalars("consistency")] == [1, 2, 3, 4]
    assert [event.step for event in events.Images("validation")] == [2, 4]


@pytest.fixture
def wandb(monkeypatch) -> types.ModuleType:
    """A stand-in for the package, which notes how runs are begun and what is logged to each."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.begun, fake.lines = [], {}

    def init(**options):
        fake.begun.append(options)
        log = fake.lines.setdefault(options["id"], [])
        return types.SimpleNamespace(log=lambda values, step: log.append(step), finish=lambda: None)

    fake.init = init
    fake.config = types.SimpleNamespace(update=lambda values, allow_val_change: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.tracking.LoggerType.WANDB])
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_a_run_that_resumes_is_the_same_run_in_wandb(settings, wandb, monkeypatch):
    stop_at(trainer(settings, trackers=("wandb",)), 3)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    trainer(settings, trackers=("wandb",)).fit()
    first, again = wandb.begun
    assert first == {"project": "stepdistill", "id": first["id"], "resume": "allow", "name": str(settings.out)}
    assert again == first | {"project": "mine"} and re.fullmatch(r"[0-9a-f]{32}", first["id"])
    assert json.loads((settings.out / "wandb.json").read_text()) == {"id": first["id"]}
    assert wandb.lines == {first["id"]: [1, 2, 3, 3, 4]}  # of which wandb ignores the second 3


def test_another_run_in_a_folder_where_none_ever_logged_is_another_run_in_wandb(settings, wandb):
    stop_at(trainer(settings, trackers=("wandb",)), 0)
    trainer(settings, trackers=("wandb",), rank=3).fit()
    first, other = wandb.begun
    assert first["id"] != other["id"] and wandb.lines == {first["id"]: [], other["id"]: [1, 2, 3, 4]}
