"""Ranks of tests, forked from a process that has imported what a rank imports: real processes without the start.

torch and DeepSpeed take 4 processor seconds to import, and the suite starts more than a hundred ranks. Each has its own
group, environment, folder, arguments and log, as `python script.py` would give it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["rank_imports"])


def start_rank(
    script: Path, words: list[str], environment: dict[str, str], folder: Path, log: Path
) -> ForkServerProcess:
    """A started process that runs `script` as __main__ with these words, in `folder`, its output in `log`."""
    process = _context.Process(target=_run, args=(str(script), words, environment, str(folder), str(log)))
    # The first start makes the server, which reads these once.
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}):
        process.start()
    return process


def _run(script: str, words: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
