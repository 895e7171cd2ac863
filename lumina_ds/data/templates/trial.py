"""A chat template is tried in a process of its own first: it may loop, compute or write without end.

Nothing in this process could stop it there. So another process compiles it and renders the conversations of samples.py,
within limits of CPU time and memory. A template that passed is used here as usual.

    python -m lumina_ds.data.templates.trial SECONDS BYTES < JSON      the process; prints {"error": ...}
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from lumina_ds.data.templates.render import TemplateRefusal, render
from lumina_ds.data.templates.samples import samples
from lumina_ds.errors import DataError, MachineError

# The templates of current models take a tenth of a second, and write a few thousand characters.
CPU_SECONDS = 5
MEMORY_BYTES = 2 << 30
MOST_CHARACTERS = 1_000_000
_ROOT = Path(__file__).parents[3]


def try_elsewhere(name: str, source: str, special_tokens: Mapping[str, str]) -> None:
    """Raise DataError where the template `name` does not end within the limits, or writes too much."""
    error = _verdict(source, tuple(sorted(special_tokens.items())))
    if error:
        raise DataError(f"chat template {name} {error}; mend the template")


@lru_cache(maxsize=32)
def _verdict(source: str, special_tokens: tuple[tuple[str, str], ...]) -> str | None:
    """What is wrong; None for nothing."""
    command = [sys.executable, "-m", __name__, str(CPU_SECONDS), str(MEMORY_BYTES)]
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **one, "PYTHONPATH": os.pathsep.join(paths)}
    costly = f"does not end within {CPU_SECONDS} seconds of CPU time and {MEMORY_BYTES >> 30} GiB of memory"
    content = json.dumps([source, dict(special_tokens)]).encode()
    try:
        tried = subprocess.run(
            command, input=content, capture_output=True, env=environment, timeout=30 * CPU_SECONDS, check=False
        )
        error: str | None = json.loads(tried.stdout)["error"]
    except (subprocess.TimeoutExpired, ValueError):  # no verdict: the kernel ended it
        return costly
    except OSError as failure:
        raise MachineError(f"cannot start a process to try a chat template: {failure.strerror}") from failure
    return error


def _main(seconds: int, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, special_tokens = json.load(sys.stdin)
    error = None
    for sample in samples():
        try:
            text = render(source, special_tokens, sample.messages, sample.tools)
        except TemplateRefusal as refusal:
            if isinstance(refusal.__cause__, MemoryError):
                return  # no verdict: the parent says what that means
            continue
        if len(text) > MOST_CHARACTERS:
            error = f"writes {len(text):,} characters for a conversation of {len(sample.messages)} turns"
            break
    print(json.dumps({"error": error}))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
