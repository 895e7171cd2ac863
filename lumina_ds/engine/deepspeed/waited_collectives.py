"""Collectives that return once gloo's threads have let their tensors go.

A tensor whose last reference is dropped by such a thread is freed there, where torch's profiler records nothing, and
a record of allocations would count it as alive for ever. Only measure/memory.py needs that, on CPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lumina_ds.engine.deepspeed.changes import Need, existing, replaced

_METHODS = (
    "allreduce",
    "reduce",
    "broadcast",
    "allgather",
    "_allgather_base",
    "reduce_scatter",
    "_reduce_scatter_base",
    "alltoall",
    "alltoall_base",
)
# alltoall_base's name from torch 2.13 on. torch's new names for the others are left out: their outputs are referred to
# for longer, and few bytes are lost.
_LATER_METHODS = ("all_to_all_single",)
NEEDS = (
    *(Need(f"torch.distributed:ProcessGroup.{name}") for name in _METHODS),
    Need("torch:Tensor._use_count"),
    Need("torch:_C._storage_Use_Count"),
)
# The threads need microseconds; a busy machine may not run them at once.
_PATIENCE_SECONDS = 10.0


@contextmanager
def waited_collectives() -> Iterator[None]:
    """Inside, waiting for a collective of any process group also waits for the threads behind it."""
    group = torch.distributed.ProcessGroup
    with ExitStack() as changes:
        for name in (*_METHODS, *(name for name in _LATER_METHODS if hasattr(group, name))):
            changes.enter_context(replaced(group, name, _waited(existing(group, name))))
        yield


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
