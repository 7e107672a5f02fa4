"""Fewer blocks, then fewer steps: the two runs in sequence, on a tiny pipeline, within the benchmark harness."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
from diffusers import StableDiffusionPipeline
from test_suite import instruments

from stepdistill.baselines.architecture.fewer_steps import fewer_steps, settings
from stepdistill.baselines.architecture.prune_then_steps import PruneThenStepsConfig
from stepdistill.cli import baselines as cli
from stepdistill.errors import InputError


@pytest.fixture
def config(pictures, tmp_path, monkeypatch) -> PruneThenStepsConfig:
    """Two updates of each training, and five images measured by one-line networks."""
    monkeypatch.setattr("stepdistill.evaluation.suite.prepare", lambda *_, **__: instruments())
    teacher = tiny.save(tmp_path / "teacher", "sd", "v_prediction", unet_options=tiny.DEEP)
    (tmp_path / "lcm.yaml").write_text("rank: 2\nguidance: [2.0]\nbatch_size: 2\nsolver_steps: 10\n")
    (tmp_path / "ladd.yaml").write_text("rank: 2\nbatch_size: 2\nblocks: [mid_block.attentions.0]\n")
    return PruneThenStepsConfig(
        teacher=str(teacher), data=pictures, out=tmp_path / "run", pictures=5, held_out=2, limit=4, max_train_steps=2,
        size=("small", "tiny"), batch_size=2, lr_warmup=0, step_updates=2, steps=(1, 2), plain_steps=(2,), guidance=2.0,
        lcm=tmp_path / "lcm.yaml", ladd=tmp_path / "ladd.yaml",
    )  # fmt: skip


def test_architecture_and_steps_end_in_one_table_and_one_plot(config):
    record = cli.finish(config)
    assert [(row["role"], row["name"]) for row in record["rows"]] == [
        ("teacher", "teacher + lcm"), ("control", "small + lcm"), ("control", "tiny + lcm"),
        ("student", "small + lcm"), ("student", "tiny + lcm"),
    ]  # fmt: skip
    assert record["gap_closed"].keys() == {"small + lcm", "tiny + lcm"}
    assert record["figure"] == "fd_2" and set(record["rows"][0]["figures"]) == {
        *(name + end for name in ("fd_1", "fd_2", "attribute_accuracy") for end in ("", "_low", "_high")), "picture_ms"
    }  # fmt: skip
    cells = {(r["model"], r["steps"]): r for r in map(json.loads, (config.out / "bench" / "results.jsonl").open())}
    names = {"teacher": "teacher", "control": "{}, untaught", "student": "{}"}
    names = [name.format(size) for name in names.values() for size in ("small", "tiny")]
    expected = {(n, 2) for n in names} | {(f"{n} + lcm", s) for n in names for s in (1, 2)}
    assert {key for key in cells if key[1]} == expected
    for row in record["rows"]:
        drawn = row["name"].replace(" +", ", untaught +") if row["role"] == "control" else row["name"]
        figures, fd = row["figures"], cells[drawn, 1]["metrics"]["fd"]
        assert figures["fd_1"] == cells[drawn, 1]["fd"]
        assert (figures["fd_1_low"], figures["fd_1_high"]) == (fd["low"], fd["high"]) and fd["low"] < fd["high"]
    assert cells["tiny", 2]["nfe"] == 4 and cells["tiny + lcm", 2]["nfe"] == 2
    assert (config.out / "pareto.png").read_bytes()[:4] == b"\x89PNG"

    teacher, small, student = (
        StableDiffusionPipeline.from_pretrained(config.out / f"steps-{role}-0" / "fused", safety_checker=None)
        for role in ("teacher", "small-student", "tiny-student")
    )
    assert teacher.unet.mid_block is not None and small.unet.mid_block is None is student.unet.mid_block
    assert [len(pipe.unet.down_blocks) for pipe in (teacher, small, student)] == [3, 3, 2]
    assert type(student.scheduler).__name__ == "LCMScheduler" and not hasattr(student.unet, "peft_config")


def test_ladd_goes_on_from_lcm_on_blocks_that_are_left(config):
    config = dataclasses.replace(config, distiller="ladd")
    lora, seconds = fewer_steps(config, config.teacher, config.data, config.out / "steps", 0)
    record = json.loads((config.out / "steps" / "ladd" / "config.json").read_text())
    assert record["start"] == str(config.out / "steps" / "lcm" / "export") and record["blocks"] == []
    assert seconds > 0 and (lora / "model_index.json").is_file()


def test_settings_that_cannot_work_are_refused_before_anything_is_trained(config):
    for changes, message in (
        ({"pictures": 0}, "pictures: got 0; allowed: 2 or more"),
        ({"lcm": None}, "lcm: got none for .*; allowed: a YAML file of train_lcm_lora.py's flags that fit it"),
        ({"steps": ()}, "steps"),
        ({"step_updates": 0}, "step_updates, steps, plain_steps: got 0"),
        ({"size": ("tiny", "base"), "teacher": "avatars"}, "one pair a stage already"),
        ({"size": ()}, "size: got none; allowed: one or more of base, small, tiny"),
        ({"size": ("tiny", "tiny")}, "size: got tiny, tiny; allowed: one or more of base, small, tiny, each once"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(config, **changes).run()
        assert not list(config.out.rglob("student.safetensors"))


def test_the_shipped_settings_fit_the_embedded_teacher():
    config = PruneThenStepsConfig(**PruneThenStepsConfig.QUICK)
    config.check()
    found = settings(config, "ladd", "folder", "data", config.out / "x", config.out / "lcm", 3)
    assert (found.teacher, found.seed, found.max_train_steps, found.blocks) == ("folder", 3, 2, ())


def test_step_settings_may_be_named_as_they_ship(config):
    found = settings(dataclasses.replace(config, lcm=Path("sd15_lcm_lora")), "lcm", "folder", "data", config.out, None)
    assert (found.teacher, found.huber_c, found.gradient_accumulation, found.lr_warmup) == ("folder", 1e-3, 4, 100)
