"""Finds the embedded teachers, data and scorer: inside the package in a wheel, in `assets/` in a checkout."""

from __future__ import annotations

from pathlib import Path

from stepdistill.errors import InputError

TEACHERS = {"avatars": "teacher", "avatars-flow": "flow-teacher"}  # name: folder
NAMES = ("avatars", "scorer", *TEACHERS.values())


def path(name: str) -> Path:
    """Returns the folder of an embedded asset: `avatars`, `scorer`, `teacher` or `flow-teacher`.

    Raises:
        InputError: an unknown name, or the installation lacks the folder.
    """
    if name not in NAMES:
        raise InputError(f"embedded asset: got {name!r}; allowed: {', '.join(NAMES)}")
    package = Path(__file__).parent
    for root in (package / "assets", package.parent / "assets"):
        if (root / name).is_dir():
            return root / name
    raise InputError(
        f"embedded asset {name!r}: not in {package.parent / 'assets'}; reinstall stepdistill from a full checkout"
    )


def data_for(teacher: str, data: str | None) -> str:
    """Returns the value of --data; by default, the dataset that the embedded teachers were trained on.

    Raises:
        InputError: --data is missing and the teacher is not embedded.
    """
    if data is None and teacher not in TEACHERS:
        raise InputError(
            f"--data: got none for {teacher}; allowed: pictures with captions, or prompts, as this teacher was made "
            "of; give --data"
        )
    return data or "avatars"
