"""A record of allocations with marks in it: live bytes at each mark, and the peak up to the next.

On a GPU the caching allocator's figures; on a CPU torch's profiler reports every allocation. Collectives are waited for
there: a tensor whose last reference is dropped by one of gloo's threads is freed in that thread, where the profiler
records nothing, and would count as alive for ever.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.utils._pytree import tree_leaves

_PREFIX = "lumina memory mark "
# all_to_all_single is alltoall_base's name from torch 2.13 on. Its new names for the others are left out: their outputs
# are referred to for longer, and few bytes are lost.
_METHODS = (
    "allreduce",
    "reduce",
    "broadcast",
    "allgather",
    "_allgather_base",
    "reduce_scatter",
    "_reduce_scatter_base",
    "alltoall",
    "all_to_all_single",
    "alltoall_base",
)
# The threads need microseconds; a busy machine may not run them at once.
_PATIENCE_SECONDS = 10.0


@contextmanager
def marked_record(device: str) -> Iterator[Any]:
    """Record what is allocated inside; gives what has `restart()`, `mark(name)`, and `read()` for (live, peaks)."""
    if device == "cuda":
        yield _CudaMarks()
        return
    marks = _CpuMarks()
    with _waited_collectives(), marks.profile:
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


@contextmanager
def _waited_collectives() -> Iterator[None]:
    """Inside, waiting for a collective of any process group also waits for the threads behind it."""
    group = torch.distributed.ProcessGroup
    # Not getattr, which unwraps the methods of C++ classes.
    before = {name: vars(group)[name] for name in _METHODS if name in vars(group)}
    for name in before:
        setattr(group, name, _waited(getattr(group, name)))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(group, name, method)


class _Work:
    """A torch Work whose wait() returns when nobody but the caller refers to its tensors."""

    def __init__(self, work: Any, tensors: list[Tensor], references: list[int]) -> None:
        self._work, self._tensors, self._references = work, tensors, references

    def wait(self, *arguments: Any, **options: Any) -> Any:
        result = self._work.wait(*arguments, **options)
        # The work itself refers to what it worked on.
        self._work = None
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for tensor, references in zip(self._tensors, self._references, strict=True):
            while _references(tensor) > references and time.monotonic() < deadline:
                time.sleep(1e-5)
        self._tensors = []
        return result

    def is_completed(self) -> bool:
        return self._work is None or self._work.is_completed()


def _waited(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((arguments[1:], options)) if isinstance(leaf, Tensor)]
        references = [_references(tensor) for tensor in tensors]
        work = method(*arguments, **options)
        return work if work is None else _Work(work, tensors, references)

    return call


def _references(tensor: Tensor) -> int:
    """To the tensor and to its storage, whose views may outlive it."""
    return tensor._use_count() + torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]
