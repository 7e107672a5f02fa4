"""Images of a source that cannot be decoded: skipped and recorded, as long as they are few."""

from __future__ import annotations

import json
from pathlib import Path

from stepdistill import files
from stepdistill.data.sources import PictureError
from stepdistill.errors import InputError

SHARE = 0.01  # of all images that may be broken; or one, if there are others


class BrokenList:
    """A file that lists the broken images, one per line; a resumed build continues it.

    Args:
        file: lines of {"sample": index, "picture": name, "reason": in a few words}; created when one is found.
        count: number of all images.
    """

    def __init__(self, file: Path, count: int) -> None:
        self.file, self.count = file, count
        self.most = min(max(1, int(SHARE * count)), count - 1)
        lines = file.read_text().splitlines() if file.exists() else []
        self._lines = {json.loads(line)["sample"]: line for line in lines}

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, sample: int, error: PictureError) -> None:
        """Records one.

        Raises:
            InputError: more are broken than allowed.
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
        """Returns a one-line summary of what was left out."""
        name = self.file.name
        return f"left out {len(self)} of {self.count} images, which are broken; {name} in the cache lists them"
