"""Samples are read a batch ahead, and come in their order."""

from __future__ import annotations

import threading

import pytest

from stepdistill.data.ahead import ahead


def test_the_next_batch_is_read_while_one_is_in_use():
    begun = {i: threading.Event() for i in range(6)}

    def read(i):
        begun[i].set()
        return i * i

    found = []
    for number, batch in enumerate(ahead(read, [range(2), range(2, 4), range(4, 6)])):
        found.append(list(batch))
        ahead_of_it = range(2 * number + 2, min(2 * number + 4, 6))
        assert all(begun[i].wait(timeout=60) for i in ahead_of_it)
        assert not any(begun[i].is_set() for i in range(2 * number + 4, 6))
    assert found == [[0, 1], [4, 9], [16, 25]]


def test_order_is_that_of_the_samples_not_of_what_is_read_first():
    last = threading.Event()

    def read(i):
        if i == 1:
            last.set()
        assert last.wait(timeout=60)
        return i

    assert [list(batch) for batch in ahead(read, [(0, 1), (2,)])] == [[0, 1], [2]]


def test_an_error_is_raised_in_the_place_of_its_value():
    def read(i):
        if i == 1:
            raise OSError("gone")
        return i

    (batch,) = ahead(read, [range(3)])
    assert next(batch) == 0
    with pytest.raises(OSError, match="gone"):
        next(batch)
    assert list(ahead(read, [])) == []
