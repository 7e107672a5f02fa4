"""Figures and grids reach the trackers, whose end does not end the process group."""

from __future__ import annotations

import pytest
from test_resume import trainer


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
