"""Blocks to encoded blocks, in this thread, in others or in other processes, always in the order of the input.

Only lines go to a worker, and finished Arrow messages come back: the parent reads, hashes and writes.
"""

from __future__ import annotations

import platform
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lumina_ds.config.chat_templates import ChatTemplate
from lumina_ds.data.templates.find import Template, tokenizer_for
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.encode import EncodedBlock, EncodeOptions, encode_block
from preprocess.processes import ProcessPool
from preprocess.scan import can_scan
from preprocess.sources import Block

# Blocks under way per worker: one being encoded, and two that wait, which is work for as long as a sync to the disk takes
# this thread. As many more may be finished and still to be written; memory does not grow with the input.
_BLOCKS_PER_WORKER = 3
# Up to so many processes the parent is one of them, which saves starting one and passing its blocks around.
_MOST_WITH_PARENT = 4
_SWITCH_SECONDS = 0.0002


@dataclass(frozen=True)
class Workers:
    """Who encodes: `count` threads or processes of `executor`, and this process itself if it `encodes_here` or there is
    no executor. `shares_memory`: they are threads."""

    executor: Executor | ProcessPool | None = None
    count: int = 0
    encodes_here: bool = False
    shares_memory: bool = False


def encode_blocks(
    blocks: Iterable[Block], tokenizer: Tokenizer, options: EncodeOptions, workers: Workers
) -> Iterator[EncodedBlock]:
    """Encode every block; results come in the order of `blocks` whatever the number of workers."""

    def encode(block: Block) -> EncodedBlock:
        return encode_block(block, tokenizer, options)

    if workers.executor is None:
        yield from map(encode, blocks)
        return
    executor = workers.executor

    def submit(block: Block) -> Future[EncodedBlock]:
        if workers.shares_memory:
            return executor.submit(encode, block)
        return executor.submit(_encode_elsewhere, tokenizer.path, tokenizer.digest, options, block)

    remaining = iter(blocks)
    pending: deque[Future[EncodedBlock]] = deque()
    most_waiting = workers.count * _BLOCKS_PER_WORKER
    most_pending = 2 * most_waiting + workers.encodes_here

    def is_idle() -> bool:
        return len(pending) < most_pending and sum(not future.done() for future in pending) < most_waiting

    try:
        while True:
            # Before each block that is written, so that no worker waits while this thread writes those that have piled up.
            while is_idle() and (block := next(remaining, None)) is not None:
                pending.append(submit(block))
            if not pending:
                return
            is_free = workers.encodes_here and not pending[0].done() and len(pending) < most_pending
            if is_free and (block := next(remaining, None)) is not None:
                pending.append(_finished(encode(block)))
            else:
                yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def local_workers(count: int, tokenizer: Tokenizer, template: Template | None = None) -> Iterator[Workers]:
    """`count` workers on this machine; one means this process itself.

    They are threads where nearly all the work is compiled code, which runs beside the interpreter: nothing has to be
    loaded twice or passed from one to the other. Else they are processes.
    """
    if count == 1:
        yield Workers()
    elif tokenizer.is_compiled() and can_scan() and isinstance(template, ChatTemplate):
        with ThreadPoolExecutor(count, "encode") as threads:
            try:
                yield Workers(threads, count, shares_memory=True)
            finally:
                threads.shutdown(wait=True, cancel_futures=True)
    else:
        with _processes(count) as workers:
            yield workers


@contextmanager
def _processes(count: int) -> Iterator[Workers]:
    # Reading and writing leaves this process time to encode; beside more than a few others it would hold them up.
    encodes_here = count <= _MOST_WITH_PARENT
    count -= encodes_here
    # The pool's threads pass blocks in many small pieces, and would wait this long for each while this one computes.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        with ProcessPool(count) as pool:
            yield Workers(pool, count, encodes_here)
    finally:
        sys.setswitchinterval(interval)


def _finished(block: EncodedBlock) -> Future[EncodedBlock]:
    future: Future[EncodedBlock] = Future()
    future.set_result(block)
    return future


def _encode_elsewhere(path: Path, digest: str, options: EncodeOptions, block: Block) -> EncodedBlock:
    return encode_block(block, tokenizer_for(_tokenizer(path, digest), options.template), options)


@lru_cache(maxsize=1)
def _tokenizer(path: Path, digest: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path, is_tried=True)
    if tokenizer.digest != digest:
        raise DataError(f"{path} on {platform.node()} is another file than where this run began; copy it there")
    return tokenizer
