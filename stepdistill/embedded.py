"""Where the embedded teachers, data and scorer lie: beside the package in a wheel, in `assets/` of a checkout."""

from __future__ import annotations

from pathlib import Path

from stepdistill.errors import InputError

TEACHERS = {"avatars": "teacher", "avatars-flow": "flow-teacher"}  # what they are called, and their folders
NAMES = ("avatars", "scorer", *TEACHERS.values())


def path(name: str) -> Path:
    """The folder of an embedded asset: `avatars`, `scorer`, `teacher` or `flow-teacher`.

    Raises:
        InputError: the name is none of these, or the installation lacks the folder.
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
    """What --data says; where it is not given, the set that an embedded teacher was made of.

    Raises:
        InputError: it is not given, for another teacher.
    """
    if data is None and teacher not in TEACHERS:
        raise InputError(
            f"--data: got none for {teacher}; allowed: pictures with captions, or prompts, as this teacher was made "
            "of; give --data"
        )
    return data or "avatars"
