"""Steps of a configuration taken one at a time, each with its times: what the verbs that measure are made of.

The engine, the read-ahead and the step are those of a run (train/run.py); evaluation, records and checkpoints are
left out. `timed_step` does without rows: its tokens are random.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import MicroBatch, PackedRows, Prefetcher, RandomRows
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.engine.build import build_engine, release, set_learning_rate
from lumina_ds.engine.world import World
from lumina_ds.model.device import device_and_precision
from lumina_ds.train.step import StepCounts, agree, rank_micro_batches, run_step

# How the profiler's ranges begin that stand for a part of the step (profile.py).
PART = "lumina part "


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, those of it that waited for data, and its tokens, padding left out, over all ranks."""

    seconds: float
    data_seconds: float
    tokens: int


class TimedSteps:
    """`with TimedSteps(config, rows, world) as steps: steps.take()`. Building and each step are collectives."""

    def __init__(self, config: RunConfig, rows: PackedRows | RandomRows, world: World) -> None:
        self.config = config
        self.rows = rows
        self.world = replace(world, sequence_parallel_size=config.deepspeed.sequence_parallel_size)
        _, self.precision, _ = device_and_precision(config.train.precision, config.model)
        self.deepspeed_json = compose_deepspeed(config, world.size, self.precision)
        self.order = TrainingOrder(rows.num_rows, config.train.seed)
        self.done = 0

    def __enter__(self) -> TimedSteps:
        self.engine = build_engine(self.config, self.world, self.precision, self.deepspeed_json)
        set_learning_rate(self.engine, self.config.train.learning_rate)
        self._batches = Prefetcher(self._micro_batches, 1 << 62)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches.close()

    def take(self) -> StepTime:
        """The next step; it ends when its loss is known on every rank, so the device is done with it."""
        train = self.config.train
        started = time.perf_counter()
        with torch.profiler.record_function(f"{PART}data"):
            batches = self._batches.take(self.done)
        data_seconds = time.perf_counter() - started
        counts = agree(batches, False, self.world)
        run_step(self.engine, batches, counts, self.config.model, train.max_grad_norm, self.world)
        if self.world.device == "cuda":
            torch.cuda.synchronize()
        self.done += 1
        return StepTime(time.perf_counter() - started, data_seconds, counts.tokens)

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        return rank_micro_batches(self.config, self.rows, self.order, step, self.world)


def measure_step_seconds(
    config: RunConfig, world: World, precision: str, deepspeed_json: Mapping[str, Any], steps: int = 4
) -> float:
    """Median seconds of an optimizer step with random tokens, after one that warms up. A collective."""
    engine = build_engine(config, world, precision, dict(deepspeed_json))
    seconds = [timed_step(engine, config, world) for _ in range(steps + 1)][1:]
    release(engine)
    return statistics.median(seconds)


def random_micro_batch(config: RunConfig, rank: int) -> MicroBatch:
    """Full rows of one document each, every position trained: the plan's worst case."""
    rows, length = config.train.micro_batch_size, config.seq_length
    tokens = np.random.default_rng(rank).integers(0, config.model.vocab_size, (rows, length + 1))
    return MicroBatch(
        input_ids=tokens[:, :-1].copy(),
        labels=tokens[:, 1:].copy(),
        position_ids=np.tile(np.arange(length), (rows, 1)),
        document_lengths=(length,) * rows,
        num_trained_tokens=rows * length,
        num_tokens=rows * length,
        row_ids=tuple(range(rows)),
        padding_mask=np.ones((rows, length), dtype=bool),
    )


def timed_step(engine: Any, config: RunConfig, world: World) -> float:
    """Seconds of one optimizer step with random tokens, the device's work included. A collective."""
    batches = [random_micro_batch(config, world.rank)] * config.train.gradient_accumulation_steps
    trained = sum(batch.num_trained_tokens for batch in batches) * world.size
    counts = StepCounts(trained, trained, stop_requested=False, save_due=False, failed=False)
    _synchronize(world)
    begin = time.perf_counter()
    run_step(engine, batches, counts, config.model, config.train.max_grad_norm, world)
    _synchronize(world)
    return time.perf_counter() - begin


def open_rows(config: RunConfig) -> PackedRows | RandomRows:
    """The rows of data.shards, or random ones where no data is named."""
    if config.data.shards is None:
        return RandomRows(config.model.vocab_size, config.seq_length)
    from lumina_ds.data.shards.folder import ShardFolder
    from lumina_ds.data.tokenizer.tokenizer import check_vocabulary

    folder = ShardFolder.open(Path(config.data.shards), force_streaming=config.data.force_streaming)
    check_vocabulary(folder.tokenizer(), config.model.vocab_size)
    return PackedRows(folder, config.seq_length)


def peak_memory(world: World) -> int:
    """Most bytes that a GPU's allocator held, or the most resident memory of a rank on a CPU; the fullest rank's."""
    if world.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(over_ranks(peak, world, dist.ReduceOp.MAX))


def over_ranks(value: float, world: World, operation: Any) -> float:
    """`value` reduced over all ranks."""
    reduced = torch.tensor(value, dtype=torch.float64, device=world.torch_device)
    dist.all_reduce(reduced, operation)
    return float(reduced)


def _synchronize(world: World) -> None:
    if world.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
