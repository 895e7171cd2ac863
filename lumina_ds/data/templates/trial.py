"""A chat template is tried in a process of its own first: it may loop, compute or write without end.

Nothing in this process could stop it there. So another process compiles it and renders the conversations of samples.py,
within limits of CPU time and memory. A template that passed is used here as usual.

    python -m lumina_ds.data.templates.trial SECONDS BYTES < JSON      the process; prints {"error": ...}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import lru_cache

from lumina_ds.data.limited import limit_this_process, verdict_of
from lumina_ds.data.templates.render import TemplateRefusal, TemplateWithoutEnd, render
from lumina_ds.data.templates.samples import samples
from lumina_ds.errors import DataError

# The templates of current models take a tenth of a second, and write a few thousand characters.
CPU_SECONDS = 5
MEMORY_BYTES = 2 << 30


def try_elsewhere(name: str, source: str, special_tokens: Mapping[str, str]) -> None:
    """Raise DataError where the template `name` does not end within the limits, or writes too much."""
    error = _verdict(source, tuple(sorted(special_tokens.items())))
    if error:
        raise DataError(f"chat template {name} {error}; mend the template")


@lru_cache(maxsize=32)
def _verdict(source: str, special_tokens: tuple[tuple[str, str], ...]) -> str | None:
    """What is wrong; None for nothing."""
    content = json.dumps([source, dict(special_tokens)]).encode()
    verdict = verdict_of(__name__, CPU_SECONDS, MEMORY_BYTES, content=content)
    if verdict is None:
        return f"does not end within {CPU_SECONDS} seconds of CPU time and {MEMORY_BYTES >> 30} GiB of memory"
    error: str | None = verdict["error"]
    return error


def _main(seconds: int, memory_bytes: int) -> None:
    limit_this_process(seconds, memory_bytes)
    source, special_tokens = json.load(sys.stdin)
    error = None
    for sample in samples():
        try:
            render(source, special_tokens, sample.messages, sample.tools)
        except TemplateWithoutEnd as without_end:
            error = str(without_end)
            break
        except TemplateRefusal as refusal:
            if isinstance(refusal.__cause__, MemoryError):
                return  # no verdict: the parent says what that means
            continue
    print(json.dumps({"error": error}))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
