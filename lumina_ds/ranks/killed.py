"""What ended a rank from outside: the signal behind an exit code, and the kernel for want of memory."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path

from lumina_ds.text import format_bytes

_GROUPS = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")
# A limit this high is none.
_NO_LIMIT = 1 << 60


def meaning(code: int) -> str:
    """What a launcher's exit code says of a signal, for a message: DeepSpeed's is 256 - N, a shell's 128 + N."""
    for number in (256 - code, code - 128):
        with contextlib.suppress(ValueError):
            return f": {signal.Signals(number).name}"
    return ""


@dataclass(frozen=True)
class _Group:
    """The files of this process's memory control group, of either version."""

    events: Path
    limit: Path
    peak: Path

    @classmethod
    def ours(cls, groups: Path = _GROUPS, mounted: Path = _MOUNTED) -> _Group | None:
        """None where the kernel has no such group; in a container its files lie at the top."""
        with contextlib.suppress(OSError):
            for line in groups.read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                old = "memory" in controllers.split(",")
                if not old and controllers:
                    continue
                top = mounted / "memory" if old else mounted
                names = _NAMES[old]
                for folder in (top / path.strip("/"), top):
                    if (folder / names[0]).is_file():
                        return cls(*(folder / name for name in names))
        return None

    def kills(self) -> int:
        """Processes of the group that the kernel has ended; 0 where it does not count them."""
        with contextlib.suppress(OSError, ValueError):
            pairs = (line.split() for line in self.events.read_text().splitlines())
            return int(dict(pair for pair in pairs if len(pair) == 2).get("oom_kill", 0))
        return 0


# Of version 2 and of version 1 (kernel: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst).
_NAMES = {
    False: ("memory.events", "memory.max", "memory.peak"),
    True: ("memory.oom_control", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
}


class MemoryKills:
    """Counts, from when it is made, the processes of this control group that the kernel ends for want of memory."""

    def __init__(self) -> None:
        self._group = _Group.ours()
        self._before = 0 if self._group is None else self._group.kills()

    def since_then(self) -> tuple[str, ...]:
        """() or one phrase: how many, the group's limit, and its peak."""
        if self._group is None or (kills := self._group.kills() - self._before) <= 0:
            return ()
        sizes = []
        for name, path in (("limit", self._group.limit), ("peak", self._group.peak)):
            with contextlib.suppress(OSError, ValueError):
                if (size := int(path.read_text())) < _NO_LIMIT:
                    sizes.append(f"{name} {format_bytes(size)}")
        processes = "a process" if kills == 1 else f"{kills} processes"
        known = f" ({', '.join(sizes)})" if sizes else ""
        return (f"the kernel ended {processes} of this control group for want of memory{known}",)
