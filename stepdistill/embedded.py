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
