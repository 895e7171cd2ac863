"""Preprocess, and die by SIGKILL at the N-th event that concerns the disk; in a write, with half of it done.

    python interrupted_run.py N INPUT TOKENIZER OUT

prints the number of events of a run that ends. N 0 never dies.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.shards.writer import HashingFile
from preprocess import journal
from preprocess.pipeline import preprocess_files

BLOCK_BYTES = 150_000
SETTINGS = Settings(seq_length=64, eval_fraction=0.2, shard_size_mb=1)


def main() -> None:
    fatal = int(sys.argv[1])
    events = 0
    write = HashingFile.write

    def is_fatal() -> bool:
        nonlocal events
        events += 1
        return events == fatal

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if is_fatal():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def write_or_die(file: HashingFile, data: Any) -> int:
        if is_fatal():
            write(file, memoryview(data)[: len(data) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data)

    journal.SEAL_EVERY_SECONDS = 0
    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, before(getattr(os, name)))
    setattr(HashingFile, "write", write_or_die)  # noqa: B010
    preprocess_files([sys.argv[2]], sys.argv[3], sys.argv[4], SETTINGS, block_bytes=BLOCK_BYTES)
    print(events)


if __name__ == "__main__":
    main()
