"""A verdict from a process of its own, for what may hang, panic or take all memory where nothing here could stop it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from lumina_ds.errors import MachineError

# Where an allocation fails, Rust now and then waits for ever on a lock of its own, and no CPU time passes.
WALL_PER_CPU_SECOND = 5
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
    limit = WALL_PER_CPU_SECOND * seconds
    try:
        tried = subprocess.run(command, input=content, capture_output=True, env=environment, timeout=limit, check=False)
        verdict: dict[str, Any] = json.loads(tried.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    except OSError as error:
        raise MachineError(f"cannot start {module} in a process of its own: {error.strerror}") from error
    return verdict


def limit_this_process(seconds: int, memory_bytes: int) -> None:
    """Let the kernel end this process beyond so much CPU time, and refuse it more memory; it leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
