"""Common to a run's processes: where they compute, when they stop, and errors when memory or disk is full."""

from __future__ import annotations

import functools
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from stepdistill.errors import InputError
from stepdistill.files import disk_full
from stepdistill.processes import PATIENCE
from stepdistill.training.sharding import YES

HALF = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed-precision
ECHO = 5.0  # seconds in which several processes may be sent one signal twice: by a scheduler, and by torchrun


def on_cpu() -> bool:
    """Whether to compute on the CPU. accelerate must know, or several processes on it do not connect."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in YES
    return forced or not torch.accelerator.is_available()


def world() -> PartialState:
    """The run's processes and their devices; they wait for each other up to PATIENCE, not NCCL's ten minutes."""
    return PartialState(cpu=on_cpu(), timeout=PATIENCE)


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


def agree(**facts: object) -> None:
    """Checks that facts, by name, are the same in all processes. All must call it.

    Raises:
        InputError: one is not.
    """
    gathered = gather_object([facts])
    for name in facts:
        if len(values := dict.fromkeys(str(each[name]) for each in gathered)) > 1:
            raise InputError(
                f"processes: got {name} {' in one and '.join(values)} in another; allowed: the same in all; give all "
                "machines one --out and one $STEPDISTILL_CACHE, on a disk that they share"
            )


def release() -> None:
    """Frees networks that only reference cycles keep alive, and their memory on the device."""
    gc.collect()
    torch.cuda.empty_cache()


@functools.cache
def _hosts() -> dist.ProcessGroup:
    """All processes, communicating without their devices, which need not be waited for."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


class StopSignal:
    """Context in which SIGTERM and SIGINT only set a flag, so that the update completes and the run is saved; a second
    signal stops at once, of several processes after ECHO seconds. `asked` returns whether any process has received one.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.several = accelerator.num_processes > 1
        self.seen: float | None = None
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
        now = time.monotonic()
        if self.seen is None:
            self.seen = now
        elif now - self.seen >= ECHO * self.several:
            self.__exit__()
            signal.raise_signal(number)

    def asked(self) -> bool:
        """True once a signal was received. All processes must call it before each update, to stop at the same one: they
        are killed half a minute after torchrun sends the signal."""
        seen = torch.tensor(float(self.seen is not None))
        if self.several:
            dist.all_reduce(seen, group=_hosts())
        return seen.item() > 0
