"""Progress bars of a benchmark, and lines between them."""

from __future__ import annotations

import os
import sys


class ReferenceBar:
    """A progress bar for the reference images, shown only if there is work to do."""

    def __init__(self, show: bool) -> None:
        self.show, self.bar = show, None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = progress_bar(total, self.show)
            self.bar.set_description("reference images")
        self.bar.update(done)
        if self.bar.n >= total:
            self.bar.close()

    def close(self) -> None:
        """Ends the bar's line, so that an error starts on a new one."""
        if self.bar is not None:
            self.bar.close()


def say(line: str) -> None:
    """Prints a line to stderr without breaking a progress bar; of several processes only the first prints."""
    from tqdm import tqdm

    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


def progress_bar(total: int, show: bool):
    """Returns a tqdm bar of `total` units with the remaining time, on stderr."""
    from tqdm import tqdm

    form = "{desc:<22} {percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left"
    return tqdm(total=total, disable=not show, bar_format=form, dynamic_ncols=True, file=sys.stderr)
