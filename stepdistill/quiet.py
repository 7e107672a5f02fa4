"""Keeps the log messages of diffusers and transformers out of progress bars and output."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NEW = re.compile(r"(\w+) (?:LOAD REPORT|were not initialized).*newly initialized", re.DOTALL)
COLOUR = re.compile(r"\x1b\[\d*m")


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(COLOUR.sub("", record.getMessage()))


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which diffusers and transformers log errors only: they would print every truncated prompt."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(library, library.get_verbosity()) for library in (of_diffusers, of_transformers)]
    for library, _ in levels:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)


@contextmanager
def collected() -> Iterator[list[str]]:
    """Context in which diffusers and transformers print no logs, warnings or progress bars; errors are still raised.

    Yields:
        The suppressed log messages, one string each.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries, listener = (of_diffusers, of_transformers), _Listener()
    levels = [library.get_verbosity() for library in libraries]
    bars = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in libraries:
        library.set_verbosity_warning()
        library.disable_default_handler()
        library.add_handler(listener)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield listener.messages
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.remove_handler(listener)
            library.enable_default_handler()
        for library in bars:
            library.enable_progress_bar()


def newly_initialised(messages: list[str]) -> list[str]:
    """Returns, from the log messages, the classes of networks whose missing weights were initialised at random."""
    return [found[1] for text in messages if (found := NEW.search(text))]
