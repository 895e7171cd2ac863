"""Blocks to encoded blocks, in this process or in others, always in the order of the input.

Only lines cross to a worker, and finished Arrow messages come back: the parent reads, hashes and writes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lumina_ds.data.tokenizer import Tokenizer
from lumina_ds.errors import MachineError
from preprocess.encode import EncodedBlock, encode_block
from preprocess.sources import Block

# Blocks under way per worker: one being encoded and one waiting, so that memory does not grow with the input.
_BLOCKS_PER_WORKER = 2


@dataclass(frozen=True)
class EncodeOptions:
    tokenizer_path: Path
    eval_fraction: float = 0.0
    max_conversations: int | None = None


@dataclass(frozen=True)
class Workers:
    """Processes that encode. executor: None to encode in this process, as its only worker."""

    executor: Executor | None
    count: int


def encode_blocks(blocks: Iterable[Block], options: EncodeOptions, workers: Workers) -> Iterator[EncodedBlock]:
    """Encode every block; results come in the order of `blocks` whatever the number of workers."""
    if workers.executor is None:
        tokenizer = Tokenizer.load(options.tokenizer_path)
        for block in blocks:
            yield encode_block(block, tokenizer, options.eval_fraction, options.max_conversations)
        return
    pending: deque[Future[EncodedBlock]] = deque()
    try:
        for block in blocks:
            pending.append(workers.executor.submit(_encode_in_worker, block, options))
            if len(pending) >= workers.count * _BLOCKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise MachineError(
            "a preprocessing worker was killed, most likely for memory; use fewer --num-workers"
        ) from error
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def local_workers(count: int) -> Iterator[Workers]:
    """`count` processes of this machine; one means this process itself."""
    if count == 1:
        yield Workers(None, 1)
        return
    # Spawned, not forked: a caller may already hold threads, which a forked child would find in odd states. A fork
    # server saves a few tenths of a second, but hides the workers' CPU time from whoever waits for this process.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield Workers(pool, count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole group; the parent ends the pool, so that only one of them reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for work on a pipe that it holds open itself: nothing else tells it that its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(block: Block, options: EncodeOptions) -> EncodedBlock:
    tokenizer = _tokenizer(options.tokenizer_path)
    return encode_block(block, tokenizer, options.eval_fraction, options.max_conversations)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)
