"""What produced a figure or a student: commit, versions, device and command."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "peft", "open_clip_torch", "timm", "stepdistill")


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Returns what produces a figure in this process: device, commit, versions and command."""
    return {"device": device_name(device), "commit": commit(), "versions": versions(), "command": command()}


def command() -> str:
    """Returns what was run, to be typed in a checkout: `stepdistill ...`, a script below this one by its relative path,
    `python -c '...'` with the code; a bare `python` if that was typed at a prompt."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    if program in ("", "-", "-c", "-m"):  # no file: the interpreter's own arguments have the code
        return shlex.join(["python", *sys.orig_argv[1:]])
    if path.name == "stepdistill" or path.parts[-2:] == ("stepdistill", "__main__.py"):
        return shlex.join(["stepdistill", *arguments])
    whole, root = path.absolute(), Path(__file__).parents[1]
    inside = whole.is_file() and whole.is_relative_to(root)
    return shlex.join([whole.relative_to(root).as_posix() if inside else program, *arguments])


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Returns this checkout's commit, with + if tracked files were changed; None in a wheel."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: str) -> str:
    """Returns a device's name, with the number of threads if it is a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    count = torch.get_num_threads()
    return f"{name}, {count} thread{'s' * (count > 1)}"
