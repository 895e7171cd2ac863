"""The deepspeed runner as `lumina train` starts it: it does not outlive who started it, nor does what it starts.

    python -m lumina_ds.ranks.deepspeed_runner RUNNER_ARGUMENTS --module MODULE WORDS

DeepSpeed's own program, by these words, in this process. A SIGKILL to `lumina train` would leave it, and the launch
module that it starts, before there is a rank that could see it (train/watch/orphans.py).
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

from lumina_ds.train.watch.orphans import end_with_starter, ending_with

# How a shell tells of a signal.
_BY_SIGNAL = 128


class _Child(subprocess.Popen[bytes]):
    """Ends with this process."""

    started: ClassVar[list[_Child]] = []

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **{"preexec_fn": ending_with(), **options})
        _Child.started.append(self)


def main() -> None:
    """Ends with the code of the ranks, or 128 + N when a signal ended the launch module: DeepSpeed would call that 0."""
    end_with_starter()
    subprocess.Popen = _Child  # type: ignore[assignment, misc]
    from lumina_ds.engine.deepspeed.remote_start import run_deepspeed_runner

    run_deepspeed_runner()
    by_signal = [-child.returncode for child in _Child.started if (child.returncode or 0) < 0]
    if by_signal:
        sys.exit(_BY_SIGNAL + by_signal[0])


if __name__ == "__main__":
    main()
