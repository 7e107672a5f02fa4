"""Common to a run's processes: where they compute, when they stop, and errors when memory or disk is full."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from stepdistill.errors import InputError
from stepdistill.files import disk_full
from stepdistill.training.sharding import YES

HALF = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed-precision


def on_cpu() -> bool:
    """Whether to compute on the CPU. accelerate must know, or several processes on it do not connect."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in YES
    return forced or not torch.accelerator.is_available()


@contextmanager
def room(out: Path, device: torch.device, batch_size: int, recomputes: bool) -> Iterator[None]:
    """Context that turns a full disk or device into an InputError with the fix; the last checkpoint is kept.

    Args:
        recomputes: whether --gradient-checkpointing can still be added.
    """
    kept = "the last checkpoint is kept"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"memory of {device}: got no room for batch_size = {batch_size}; {kept}; lower --batch-size and raise "
            "--gradient-accumulation" + ", or add --gradient-checkpointing" * recomputes
        ) from error
    except OSError as error:
        if not disk_full(error):
            raise
        fix = "free some and run the same command again"
        raise InputError(f"disk: got no space left in {out}; {kept}; {fix}") from error


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Context that one process at a time is in: the first makes a file, however long it takes, and the others read it;
    a barrier would give up after minutes."""
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        yield


class StopSignal:
    """Context in which SIGTERM and SIGINT only set a flag, so that the update completes and the run is saved; a second
    signal stops at once. `asked` returns whether any process has received one."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.seen = False
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._see) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _see(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        self.__exit__()

    def asked(self, agree: bool) -> bool:
        """True once a signal was received. Several processes must stop at the same update: they communicate only if
        `agree` is set (the same for all), and continue until then."""
        if self.accelerator.num_processes == 1:
            return self.seen
        if not agree:
            return False
        seen = torch.tensor(float(self.seen), device=self.accelerator.device)
        return self.accelerator.reduce(seen, "sum").item() > 0
