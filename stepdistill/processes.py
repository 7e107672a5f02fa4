"""The processes started by `accelerate launch`: they share the work of a benchmark or a cache, and fail together.

    accelerate launch --multi_gpu --num_processes 8 -m stepdistill bench --model ...
    torchrun --nproc-per-node 2 -m stepdistill bench --device cpu --model ...

Process r of R generates batches r, r + R, ... of each cell of a benchmark, or makes shards r, r + R, ... of a cache.
The main process, r = 0, computes and writes all figures. All equal those of a single process, since what is kept of a
batch or shard depends on it alone.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from stepdistill.errors import InputError
from stepdistill.files import unwritable

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # the others wait while the main process computes figures or reads real images


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `count`; by default the only one."""

    rank: int = 0
    count: int = 1

    @classmethod
    def found(cls, device: str) -> Processes:
        """Connects the launched processes, through gloo if `device` is a CPU.

        Raises:
            InputError: they were already initialised for another kind of device and are not connected.
        """
        launched = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
        if launched == 1:
            return cls()
        from accelerate import PartialState

        if not torch.distributed.is_initialized():
            atexit.register(_leave)
        state = PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE)
        if state.num_processes != launched:
            raise InputError(
                f"processes: got {launched} launched, which do not find each other on {device}; allowed: one kind of "
                "device; give Accelerator(cpu=True) on a CPU"
            )
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this process's share of the items."""
        return items[self.rank :: self.count]

    def gather(self, own: T) -> list[T]:
        """Returns each process's value, in order of rank, in every process."""
        if self.count == 1:
            return [own]
        from accelerate.utils import gather_object

        return gather_object([own])

    def broadcast(self, value: T) -> T:
        """Returns the main process's value, in every process."""
        return self.gather(value if self.main else None)[0]

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Makes an error in one process an error in all, so that none waits for another. Cannot be nested.

        Raises:
            OSError: another process cannot write. InputError: another process failed for any other reason.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather(
            None if failure is None else (unwritable(failure), getattr(failure, "errno", None), reason(failure))
        )
        if failure is not None:
            raise failure
        for cannot_write, number, words in filter(None, failures):
            raise OSError(number, words) if cannot_write else InputError(words)


def is_rank_zero() -> bool:
    """Whether this process is the one that prints, among launched processes that are not connected yet."""
    return os.environ.get("RANK", "0") == "0"


def reason(error: Exception) -> str:
    """Returns an error as one line, with its type unless it is an InputError."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if isinstance(error, InputError) else f"{type(error).__name__}: {words}"


def _leave() -> None:
    """Leaves the process group: threads of gloo and NCCL that still listen when Python exits may abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
