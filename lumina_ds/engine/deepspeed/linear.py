"""torch.nn.functional.linear as torch made it, after DeepSpeed's ZeRO-3.

ZeRO-3's first engine exchanges it for one of its own (deepspeed/runtime/zero/linear.py) for the rest of the process,
which would change the memory that a later engine of another stage takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F

from lumina_ds.engine.deepspeed.changes import Need

NEEDS = (
    Need("torch.nn.functional:linear"),
    Need(
        "deepspeed.runtime.zero.partition_parameters:InsertPostInitMethodToModuleSubClasses",
        contains="torch.nn.functional.linear = zero3_linear_wrap",
    ),
)


@contextmanager
def own_linear() -> Iterator[None]:
    """After it, torch.nn.functional.linear is what it was before."""
    linear = F.linear
    try:
        yield
    finally:
        F.linear = linear
