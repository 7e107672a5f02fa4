"""Reads samples in threads, a batch ahead of the one in use: a device need not wait while images are decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(read: Callable[[int], T], batches: Iterable[Iterable[int]]) -> Iterator[Iterator[T]]:
    """Yields, for each batch, an iterator over read(i) of its samples, in order. What `read` raises is raised there.

    Args:
        read: safe to call from several threads; those that decode images release the GIL.
    """
    pool, waiting = ThreadPoolExecutor(), deque()
    try:
        for batch in batches:
            waiting.append(pool.map(read, batch))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)
