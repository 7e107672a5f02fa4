"""What a record says was run can be run again: the command is named as it is typed in a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stepdistill import provenance

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/opt/venv/bin/stepdistill", "bench", "--out", "a b"], "stepdistill bench --out 'a b'"),
        ([str(ROOT / "stepdistill/__main__.py"), "demo"], "stepdistill demo"),
        ([str(ROOT / "benchmarks/students.py"), "--n", "5"], "benchmarks/students.py --n 5"),
        (["benchmarks/students.py"], "benchmarks/students.py"),
        (["students.py"], "students.py"),
        (["/elsewhere/own.py", "x"], "/elsewhere/own.py x"),
    ],
)
def test_a_command_is_named_as_it_is_typed_in_a_checkout(argv, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(ROOT)
    assert provenance.command() == expected


def test_a_script_is_named_by_its_place_wherever_it_is_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["students.py"])
    monkeypatch.chdir(ROOT / "benchmarks")
    assert provenance.command() == "benchmarks/students.py"


def test_code_of_the_command_line_is_in_the_command():
    code = "from stepdistill import provenance; print(provenance.command())"
    found = subprocess.run([sys.executable, "-c", code, "x"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"python -c '{code}' x"
