"""How fast a shard folder opens and its rows are gathered: what `lumina bench loader` prints."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from lumina_ds.data.loader import PackedRows
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.data.shards.folder import ReadingMode, ShardFolder


@dataclass(frozen=True)
class LoaderSpeed:
    """One measurement in this process, with one thread.

    Start-up, in seconds: shards opened, packing plan read (or made, where there was none), first micro-batch there.
    Rates count tokens, not padding; `per_core` divides by the processor's time, so it leaves out the waiting for a
    disk or for other programs. Memory is what the loader adds to the process: its own, and pages of mapped files,
    which the system takes back when it needs them.
    """

    mode: ReadingMode
    shard_bytes: int
    num_documents: int
    num_tokens: int
    num_rows: int
    seq_length: int
    batch_size: int
    open_seconds: float
    plan_seconds: float
    first_batch_seconds: float
    startup_seconds: float
    measured_seconds: float
    measured_rows: int
    rows_per_second: float
    tokens_per_second: float
    tokens_per_second_per_core: float
    memory_bytes: int
    mapped_bytes: int


def measure_loader(
    path: Path, seq_length: int | None, batch_size: int, seconds: float, force_streaming: bool = False
) -> LoaderSpeed:
    """Open the folder, then gather shuffled micro-batches of `batch_size` rows for `seconds`.

    seq_length None means the folder's own. Raises DataError where the folder cannot be trained on.
    """
    own_before, mapped_before = _memory()
    started = time.perf_counter()
    folder = ShardFolder.open(path, force_streaming)
    opened = time.perf_counter()
    rows = PackedRows(folder, seq_length or folder.manifest.settings.seq_length)
    planned = time.perf_counter()
    order = TrainingOrder(rows.num_rows, seed=0)
    rows.collate(order.step_rows(0, 0, 0, 1, batch_size, 1))
    ready, processor = time.perf_counter(), time.process_time()
    step = num_tokens = 0
    while step == 0 or time.perf_counter() - ready < seconds:
        step += 1
        num_tokens += rows.collate(order.step_rows(step, 0, 0, 1, batch_size, 1)).num_tokens
    elapsed, processor = time.perf_counter() - ready, time.process_time() - processor
    own, mapped = _memory()
    return LoaderSpeed(
        mode=folder.mode,
        shard_bytes=sum(shard.size_bytes for shard in folder.manifest.shards),
        num_documents=folder.num_documents,
        num_tokens=folder.manifest.totals.tokens,
        num_rows=rows.num_rows,
        seq_length=rows.seq_length,
        batch_size=batch_size,
        open_seconds=opened - started,
        plan_seconds=planned - opened,
        first_batch_seconds=ready - planned,
        startup_seconds=ready - started,
        measured_seconds=elapsed,
        measured_rows=step * batch_size,
        rows_per_second=step * batch_size / elapsed,
        tokens_per_second=num_tokens / elapsed,
        tokens_per_second_per_core=num_tokens / processor,
        memory_bytes=own - own_before,
        mapped_bytes=mapped - mapped_before,
    )


def _memory() -> tuple[int, int]:
    """(memory of its own, pages of files) that this process holds, in bytes."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared, memory.shared
