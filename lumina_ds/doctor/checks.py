"""The table of checks, in the order in which they are shown. To add one, write a function and name it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lumina_ds.doctor import devices, software, storage
from lumina_ds.doctor.finding import Finding, Surroundings

Check = Callable[[Surroundings], Finding]

CHECKS: tuple[Check, ...] = (
    software.python,
    software.libraries,
    software.pytorch,
    software.cuda,
    devices.gpu_generation,
    devices.cpus,
    software.collectives,
    software.deepspeed,
    software.deepspeed_ops,
    software.compilers,
    software.cuda_compiler,
    software.flash_attention,
    software.mpi,
    storage.memory,
    storage.runs_disk,
    storage.temporary_disk,
    storage.shared_memory,
    storage.extension_locks,
    storage.ports,
    storage.host_name,
    storage.launcher_variables,
    storage.limits,
    storage.text_encoding,
)


def examine(around: Surroundings, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Run every check. One that fails itself is a warning, and the others go on."""
    return [_run(check, around) for check in checks]


def _run(check: Check, around: Surroundings) -> Finding:
    try:
        return check(around)
    except Exception as error:  # a machine may be broken in any way, and the other lines still help
        says = f"the check itself failed: {type(error).__name__}: {error}"
        return Finding(check.__name__.replace("_", " "), "warning", says, "please report this line")
