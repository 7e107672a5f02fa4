"""The command explains itself, takes hyphens and underscores, and reports errors in one line with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stepdistill
from stepdistill import cli
from stepdistill.cli.command import guard

ROOT = Path(__file__).parents[1]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    said = capsys.readouterr()
    return code, said.out, said.err


def one_line(code: int, err: str) -> bool:
    return code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_help_names_every_command_and_shows_a_spec(capsys):
    for argv in ([], ["--help"], ["-h"]):
        code, out, _ = run(capsys, *argv)
        assert code == 0 and all(name in out for name in cli.COMMANDS) and "stepdistill demo" in out and "lora=" in out


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"stepdistill {stepdistill.__version__}\n", "")


def test_an_unknown_command_gets_the_nearest_one(capsys):
    code, _, err = run(capsys, "bensh")
    assert one_line(code, err) and "did you mean bench?" in err


@pytest.mark.parametrize("flags", [["--stepz", "4"], ["--n", "many"], ["--n"], ["--seed", "0.5"]])
def test_bad_flags_get_one_line(capsys, flags):
    code, _, err = run(capsys, "bench", *flags)
    assert one_line(code, err) and "bench --help" in err and "─" not in err


def test_a_missing_argument_gets_one_line(capsys):
    code, _, err = run(capsys, "report")
    assert one_line(code, err)


def test_the_help_of_a_command_explains_its_flags(capsys):
    code, out, _ = run(capsys, "bench", "--help")
    assert code == 0 and "--latency-batch" in out and "SPEC" in out


def test_hyphens_and_underscores_both_work(capsys, tmp_path):
    for flags in (["--dry-run", "--latency-batch", "2"], ["--dry_run", "--latency_batch", "2"]):
        code, out, _ = run(
            capsys, "bench", "--model", "t=avatars,scheduler=ddim", "--model", "b=x/y", "--steps", "1", "4", *flags
        )
        assert code == 0 and "4 cells" in out and "t: avatars,scheduler=ddim at 1 4 steps" in out and "b: x/y" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0", "--model", "avatars"], "steps: got 0"),
        (["--protocol", "nothing", "--model", "avatars"], "avatars-2k"),
        ([], "got none"),
        (["--model", "avatars", "--device", "tpu"], "tpu"),
        (["--model", "avatars", "--n", "999999"], "prompts for n"),
    ],
)
def test_bench_refuses_bad_input_in_one_line(capsys, tmp_path, flags, words):
    code, _, err = run(capsys, "bench", "--out", str(tmp_path), *flags)
    assert one_line(code, err) and words in err


def test_a_path_below_a_file_and_a_gpu_that_is_too_small_get_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")

    def small():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    def huge():
        torch.empty(1 << 50)

    for command, words in (
        (lambda: (tmp_path / "file" / "x").mkdir(), "/x (Not a directory); allowed: a place"),
        (lambda: (tmp_path / "file").mkdir(), "file (File exists); allowed: a place"),
        (small, "memory: got CUDA out of memory; allowed: what fits; lower --batch"),
        (huge, "allowed: what fits; lower --batch"),
        (lambda: bytearray(1 << 60), "memory: got none left; allowed: what fits"),
    ):
        code = guard(command)
        err = capsys.readouterr().err
        assert one_line(code, err) and words in err
    with pytest.raises(FileNotFoundError):  # of a bug, more likely
        guard(lambda: (tmp_path / "nowhere").read_text() and 0)


def test_the_module_runs_as_the_command():
    found = subprocess.run(
        [sys.executable, "-m", "stepdistill", "nonsense"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert one_line(found.returncode, found.stderr)


def test_the_command_is_light():
    heavy = "('torch', 'diffusers', 'tyro', 'matplotlib')"
    code = f"import sys, stepdistill.cli; sys.exit(sum(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
