"""The bars of a benchmark, and the quiet they need."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager


class ReferenceBar:
    """A bar for the reference's pictures, shown only when there is something to do."""

    def __init__(self, show: bool) -> None:
        self.show, self.bar = show, None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = progress_bar(total, self.show)
            self.bar.set_description("reference pictures")
        self.bar.update(done)
        if self.bar.n >= total:
            self.bar.close()

    def close(self) -> None:
        """Ends its line, so that an error has one of its own."""
        if self.bar is not None:
            self.bar.close()


def say(line: str) -> None:
    """A line on stderr, on one of its own where there is a bar; of several processes the first says it."""
    from tqdm import tqdm

    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


@contextmanager
def quiet():
    """diffusers and transformers print every prompt that is longer than a text encoder reads, over the bar."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    levels = ours.get_verbosity(), theirs.get_verbosity()
    ours.set_verbosity_error(), theirs.set_verbosity_error()
    try:
        yield
    finally:
        ours.set_verbosity(levels[0]), theirs.set_verbosity(levels[1])


def progress_bar(total: int, show: bool):
    """A tqdm bar of `total` units with the time left, on stderr."""
    from tqdm import tqdm

    form = "{desc:<22} {percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left"
    return tqdm(total=total, disable=not show, bar_format=form, dynamic_ncols=True, file=sys.stderr)
