"""A verdict from a process of its own, for what may hang, panic or take all memory where nothing here could stop it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lumina_ds.errors import MachineError

# Where an allocation fails, Rust now and then waits for ever on a lock of its own: all threads sleep, no CPU time passes.
STILL_SECONDS = 2.0
WALL_PER_CPU_SECOND = 5  # The end where the kernel does not tell what a process does.
_LOOK_SECONDS = 0.05
_ROOT = Path(__file__).parents[2]


def verdict_of(
    module: str, seconds: int, memory_bytes: int, *words: str, content: bytes = b""
) -> dict[str, Any] | None:
    """The JSON object that `python -m MODULE SECONDS BYTES WORDS` prints, with `content` on its standard input.

    The module calls limit_this_process first. None where it ends without a verdict: by a limit, the kernel, or a panic.
    Raises MachineError where no process can be started.
    """
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **one, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, str(seconds), str(memory_bytes), *words]
    try:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as tried:
            output = _output_of(tried, content, WALL_PER_CPU_SECOND * seconds)
        verdict: dict[str, Any] = json.loads(output)
    except ValueError:
        return None
    except OSError as error:
        raise MachineError(f"cannot start {module} in a process of its own: {error.strerror}") from error
    return verdict


def _output_of(process: subprocess.Popen[bytes], content: bytes, limit_seconds: float) -> bytes:
    """What the process printed until it ended, or was ended because it stood still or took too long."""
    begun = moved = time.monotonic()
    used = -1.0
    waiting: bytes | None = content
    while True:
        try:
            output, _ = process.communicate(waiting, timeout=_LOOK_SECONDS)
            return output
        except subprocess.TimeoutExpired:
            waiting = None  # communicate goes on with what it got first.
        now = time.monotonic()
        working, seen = _progress(process.pid)
        if working or seen != used:
            moved, used = now, seen
        if now - moved > STILL_SECONDS or now - begun > limit_seconds:
            process.kill()


def _progress(pid: int) -> tuple[bool, float]:
    """Whether a thread of the process runs or waits for a core or a disk, and its CPU seconds so far."""
    import psutil  # here, so that lumina doctor works on a machine without it

    try:
        process = psutil.Process(pid)
        threads = [psutil.Process(thread.id).status() for thread in process.threads()]
        times = process.cpu_times()
    except psutil.Error:
        return True, 0.0
    return any(status != psutil.STATUS_SLEEPING for status in threads), times.user + times.system


def limit_this_process(seconds: int, memory_bytes: int) -> None:
    """Let the kernel end this process beyond so much CPU time, and refuse it more memory; it leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
