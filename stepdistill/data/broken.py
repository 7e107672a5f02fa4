"""Images of a source that cannot be decoded: skipped and recorded, as long as they are few."""

from __future__ import annotations

import json
from pathlib import Path

from stepdistill import files
from stepdistill.data.sources import PictureError
from stepdistill.errors import InputError

SHARE = 0.01  # of all images that may be broken; or one, if there are others


class BrokenList:
    """The broken images that a cache's processes find; a resumed build continues the list.

    Args:
        folder: of the cache. Each process writes its own file there when it finds one, the main process broken.jsonl:
            lines of {"sample": index, "picture": name, "reason": in a few words}.
        count: number of all images. rank: of the process.
    """

    def __init__(self, folder: Path, count: int, rank: int = 0) -> None:
        self.folder, self.count = folder, count
        self.file = folder / (f"broken-{rank}.jsonl" if rank else "broken.jsonl")
        self.most = min(max(1, int(SHARE * count)), count - 1)
        self._lines: dict[int, str] = {}
        self._read()

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, sample: int, error: PictureError) -> None:
        """Records one.

        Raises:
            InputError: more are broken than allowed.
        """
        if sample in self._lines:
            return
        self._lines[sample] = json.dumps({"sample": sample, "picture": error.name, "reason": error.reason})
        self._write()
        self._check()

    def merge(self) -> None:
        """Collects what all processes found in this process's file; the main process calls it when they are done.

        Raises:
            InputError: together more are broken than allowed.
        """
        others = self._read()
        self._check()
        if others:
            self._write()
            for file in others:
                file.unlink()

    def too_many(self) -> bool:
        """Whether all processes together have found more than allowed."""
        self._read()
        return len(self) > self.most

    def summary(self) -> str:
        """Returns a one-line summary of what was left out."""
        name = self.file.name
        return f"left out {len(self)} of {self.count} images, which are broken; {name} in the cache lists them"

    def _read(self) -> list[Path]:
        """Reads all processes' files; returns those of the others."""
        found = sorted(self.folder.glob("broken*.jsonl"))
        for file in found:
            self._lines |= {json.loads(line)["sample"]: line for line in file.read_text().splitlines()}
        return [file for file in found if file != self.file]

    def _write(self) -> None:
        files.write(self.file, "".join(self._lines[sample] + "\n" for sample in sorted(self._lines)))

    def _check(self) -> None:
        if len(self) > self.most:
            last = json.loads(list(self._lines.values())[-1])
            raise InputError(
                f"picture: got {last['picture']}, which is broken ({last['reason']}), and {len(self) - 1} before it; "
                f"allowed: {self.most} of {self.count}; replace or remove them"
            )
