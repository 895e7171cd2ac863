"""Whether an error means that memory ran out: a rank cannot go on after it, but the run may, with smaller pieces."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Of a card, of Python, or of torch's CPU allocator, which raises a plain RuntimeError (c10/core/alloc_cpu.cpp)."""
    import torch

    refused = "DefaultCPUAllocator" in str(error) and ("allocate memory" in str(error) or "enough memory" in str(error))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and refused)
