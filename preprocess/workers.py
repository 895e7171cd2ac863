"""Blocks to encoded blocks, in one process or several, always in the order of the input."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
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


def encode_blocks(blocks: Iterable[Block], options: EncodeOptions, num_workers: int) -> Iterator[EncodedBlock]:
    """Encode every block; results come in the order of `blocks` whatever the number of workers."""
    if num_workers == 1:
        tokenizer = Tokenizer.load(options.tokenizer_path)
        for block in blocks:
            yield encode_block(block, tokenizer, options.eval_fraction, options.max_conversations)
        return
    # Spawned, not forked: a caller may already hold threads, which a forked child would find in odd states.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker, (options,))
    try:
        yield from _in_order(pool, blocks, num_workers * _BLOCKS_PER_WORKER)
    except BrokenProcessPool as error:
        raise MachineError(
            "a preprocessing worker was killed, most likely for memory; use fewer --num-workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, blocks: Iterable[Block], limit: int) -> Iterator[EncodedBlock]:
    pending: deque[Future[EncodedBlock]] = deque()
    for block in blocks:
        pending.append(pool.submit(_encode_in_worker, block))
        if len(pending) >= limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


_worker: tuple[Tokenizer, EncodeOptions] | None = None


def _start_worker(options: EncodeOptions) -> None:
    global _worker
    # Ctrl-C reaches the whole group; the parent ends the pool, so that only one of them reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = Tokenizer.load(options.tokenizer_path), options


def _encode_in_worker(block: Block) -> EncodedBlock:
    assert _worker is not None
    tokenizer, options = _worker
    return encode_block(block, tokenizer, options.eval_fraction, options.max_conversations)
