"""The files of benchmarks/ for users are in the wheel, and the functions that load them find them there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from stepdistill import cli
from stepdistill.evaluation import shipped
from stepdistill.evaluation.catalogue import catalogue
from stepdistill.evaluation.gate import load_gate
from stepdistill.evaluation.protocols import load_protocol, names
from stepdistill.evaluation.records import Book

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The files of benchmarks/ that pyproject.toml puts into the wheel, laid out as by pip, and nothing else."""
    put = re.findall(r'^"(benchmarks/[^"]+)" = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for source, target in put:
        place = tmp_path / "site" / target
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, place)
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "site" / "stepdistill")
    catalogue.cache_clear()
    yield
    catalogue.cache_clear()


def test_protocols_gates_and_ready_models_are_found_in_a_wheel_as_in_a_checkout(installed, monkeypatch):
    held = {name: load_protocol(name) for name in names()}, load_gate("mlperf-sdxl"), dict(catalogue())
    monkeypatch.undo()
    catalogue.cache_clear()
    assert held == ({name: load_protocol(name) for name in names()}, load_gate("mlperf-sdxl"), dict(catalogue()))
    assert set(held[0]) == {f.stem for f in (ROOT / "benchmarks" / "protocols").iterdir()}
    assert {f.stem for f in (ROOT / "benchmarks" / "gates").iterdir()} == set(shipped.names("gates"))


def test_a_gate_is_named_on_the_command_line_of_an_installed_wheel(installed, tmp_path, capsys):
    told = {"protocol": "mlperf-sdxl-5k", "n": 5000, "fd_extractor": "Inception", "guidance": 8.0,
            "clip_model": "ViT-B-32/openai", "scheduler": "EulerDiscreteScheduler", "spacing": "leading",
            "protocol_hash": "abc", "model": "sdxl", "steps": 20, "fd": 23.5, "clip_score": 31.75}  # fmt: skip
    Book(tmp_path / "bench", {"protocol_hash": "abc", "protocol": "mlperf-sdxl-5k"}).add(told)
    assert cli.main(["bench", "gate", str(tmp_path / "bench"), "--gate", "mlperf-sdxl"]) == 0
    assert capsys.readouterr().out.count("met ") == 2
    assert cli.main(["bench", "gate", str(tmp_path / "bench"), "--gate", "mlperf"]) == 2
    assert "--gate: got mlperf; allowed: mlperf-sdxl, or a path to a .yaml file" in capsys.readouterr().err
