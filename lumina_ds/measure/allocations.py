"""A record of allocations with marks in it: live bytes at each mark, and the peak up to the next.

On a GPU the caching allocator's figures; on a CPU torch's profiler reports every allocation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._profiler import _EventType

from lumina_ds.engine.deepspeed.waited_collectives import waited_collectives

_PREFIX = "lumina memory mark "


@contextmanager
def marked_record(device: str) -> Iterator[Any]:
    """Record what is allocated inside; gives what has `restart()`, `mark(name)`, and `read()` for (live, peaks)."""
    if device == "cuda":
        yield _CudaMarks()
        return
    marks = _CpuMarks()
    with waited_collectives(), marks.profile:
        yield marks


class _CpuMarks:
    """Places in the profiler's record; live bytes at each and the peak up to the next."""

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.round = 0

    def restart(self) -> None:
        self.round += 1

    def mark(self, name: str) -> None:
        with torch.profiler.record_function(f"{_PREFIX}{self.round} {name}"):
            pass

    def read(self) -> tuple[dict[str, int], dict[str, int]]:
        live: dict[str, int] = {}
        peaks: defaultdict[str, int] = defaultdict(int)
        now, place = 0, None
        current = f"{_PREFIX}{self.round} "
        held: dict[int, int] = {}
        for event in sorted(_flattened(self.profile), key=lambda event: event.start_time_ns):
            if event.tag == _EventType.Allocation:
                if _is_of_gloo(event):
                    continue
                address, size = event.typed[1].ptr, event.typed[1].alloc_size
                if size > 0:
                    # Frees in threads of others are not recorded; the next use of the place tells.
                    now += size - held.get(address, 0)
                    held[address] = size
                else:
                    # What was allocated before the record began is not in it either.
                    now -= held.pop(address, 0)
            elif event.name.startswith(current):
                place = event.name.removeprefix(current)
                live[place] = max(now, live.get(place, 0))
            if place is not None:
                peaks[place] = max(peaks[place], now)
        return live, peaks


def _is_of_gloo(event: Any) -> bool:
    """Whether gloo made a copy for itself, which its threads free unseen; NCCL makes none."""
    parent = event.parent
    while parent is not None:
        if parent.name.startswith("c10d::"):
            return True
        parent = parent.parent
    return False


def _flattened(profile: torch.profiler.profile) -> Iterator[Any]:
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


class _CudaMarks:
    """The caching allocator's own figures."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.live: dict[str, int] = {}
        self.peaks: defaultdict[str, int] = defaultdict(int)
        self.place: str | None = None

    def mark(self, name: str) -> None:
        self._close()
        torch.cuda.reset_peak_memory_stats()
        self.place = name
        self.live[name] = max(torch.cuda.memory_allocated(), self.live.get(name, 0))

    def read(self) -> tuple[dict[str, int], dict[str, int]]:
        return self.live, self.peaks

    def _close(self) -> None:
        if self.place is not None:
            self.peaks[self.place] = max(self.peaks[self.place], torch.cuda.max_memory_allocated())
