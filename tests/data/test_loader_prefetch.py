"""Batches made ahead: in order, bounded, one at a time, errors where they belong, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from lumina_ds.data.loader import STEPS_AHEAD, Prefetcher
from lumina_ds.errors import DataError


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "never"
        time.sleep(0.001)


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_batches_come_in_order_and_are_made_once() -> None:
    made: list[int] = []

    def make(step: int) -> str:
        made.append(step)
        return f"batch {step}"

    with Prefetcher(make, end=9) as batches:
        assert [batches.take(step) for step in range(3, 9)] == [f"batch {step}" for step in range(3, 9)]
    assert made == list(range(3, 9))


def test_it_reads_ahead_so_far_and_no_further() -> None:
    made: list[int] = []
    with Prefetcher(made.append, end=100) as batches:
        batches.take(0)
        wait_until(lambda: len(made) == 1 + STEPS_AHEAD)
        time.sleep(0.02)
        assert made == list(range(1 + STEPS_AHEAD))
        batches.take(1)
        wait_until(lambda: len(made) == 2 + STEPS_AHEAD)


def test_batches_are_made_while_a_step_trains() -> None:
    made = threading.Event()
    with Prefetcher(lambda step: made.set() if step == 1 else None, end=2) as batches:
        batches.take(0)
        assert made.wait(10)


def test_an_error_is_raised_at_its_step() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise DataError("shard-00003.arrow is damaged")
        return step

    with Prefetcher(make, end=5) as batches:
        assert [batches.take(0), batches.take(1)] == [0, 1]
        with pytest.raises(DataError, match=r"shard-00003.arrow is damaged"):
            batches.take(2)
    assert not prefetch_threads()


def test_going_back_or_ahead_gives_that_steps_batch() -> None:
    with Prefetcher(lambda step: step * 10, end=50) as batches:
        assert [batches.take(step) for step in (4, 5, 2, 3, 40, 41, 49, 0)] == [40, 50, 20, 30, 400, 410, 490, 0]


def test_leaving_early_ends_the_thread() -> None:
    release = threading.Event()

    def make(step: int) -> int:
        if step:
            release.wait(10)
        return step

    with pytest.raises(KeyError), Prefetcher(make, end=50) as batches:
        batches.take(0)
        assert prefetch_threads()
        release.set()
        raise KeyError
    assert not prefetch_threads()
