"""The pictures of a source that cannot be decoded: left out and counted, as long as they are few."""

from __future__ import annotations

import json
from pathlib import Path

from stepdistill import files
from stepdistill.data.sources import PictureError
from stepdistill.errors import InputError

SHARE = 0.01  # of all that may be broken; or one, where there are others


class BrokenList:
    """A file of the broken pictures, a line each, which a build that goes on where it stopped goes on with.

    Args:
        file: {"sample": its number, "picture": its name, "reason": in a few words}; there once one is found.
        count: of all pictures.
    """

    def __init__(self, file: Path, count: int) -> None:
        self.file, self.count = file, count
        self.most = min(max(1, int(SHARE * count)), count - 1)
        lines = file.read_text().splitlines() if file.exists() else []
        self._lines = {json.loads(line)["sample"]: line for line in lines}

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, sample: int, error: PictureError) -> None:
        """Notes one.

        Raises:
            InputError: they are too many now.
        """
        if sample in self._lines:
            return
        if len(self) + 1 > self.most:
            raise InputError(
                f"picture: got {error.name}, which is broken ({error.reason}), and {len(self)} before it; allowed: "
                f"{self.most} of {self.count}; replace or remove them"
            ) from error
        self._lines[sample] = json.dumps({"sample": sample, "picture": error.name, "reason": error.reason})
        files.write(self.file, "".join(line + "\n" for line in self._lines.values()))

    def told(self) -> str:
        """What was left out, in a line."""
        name = self.file.name
        return f"left out {len(self)} of {self.count} pictures, which are broken; the cache's {name} names them"
