"""DeepSpeed's init_distributed without its shared-memory op.

It would build deepspeed_shm_comm, which needs a compiler, and which leaves 69 MB of /dev/shm behind for every rank and
run. gloo carries the same traffic.
"""

from __future__ import annotations

from lumina_ds.engine.deepspeed.changes import Need
from lumina_ds.errors import MachineError

_OP = "deepspeed_shm_comm"
NEEDS = (Need("deepspeed.ops:__compatible_ops__"),)


def skip_shared_memory_op() -> None:
    """Take the op off the list of those that can be built here. For the whole process."""
    from deepspeed.ops import __compatible_ops__

    if _OP not in __compatible_ops__:
        raise MachineError(f"the installed deepspeed knows no op {_OP}, which must not be built; install 0.19.8")
    __compatible_ops__[_OP] = False
