"""The largest micro-batch of a run that fits, with the accumulation that leaves the rows of a step as they are."""

from __future__ import annotations

from dataclasses import dataclass

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan.layout import Composer
from lumina_ds.plan.memory import plan_memory
from lumina_ds.text import counted, format_bytes


@dataclass(frozen=True)
class BatchChoice:
    """`num_readers` are the ranks that read rows of their own; `limited_by` says why no larger one was taken."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    num_readers: int
    limited_by: str

    @property
    def line(self) -> str:
        micro, accumulation, readers = self.micro_batch_size, self.gradient_accumulation_steps, self.num_readers
        rows = micro * accumulation * readers
        ranks = counted(readers, "rank")
        return f"micro-batch {micro} x accumulation {accumulation} x {ranks} = {counted(rows, 'row')}; limited by {self.limited_by}"

    def smaller(self) -> BatchChoice | None:
        """The next smaller micro-batch with the same rows per step, after this one was tried; None below one row."""
        if self.micro_batch_size == 1:
            return None
        micro = next_smaller(self.micro_batch_size)
        accumulation = self.gradient_accumulation_steps * (self.micro_batch_size // micro)
        tried = f"memory: a step with {counted(self.micro_batch_size, 'row')} was tried and did not fit"
        return BatchChoice(micro, accumulation, self.num_readers, tried)


def next_smaller(micro_batch_size: int) -> int:
    """Half, or the largest divisor of an odd number: the accumulation can make up for exactly these."""
    divisors = range(2, micro_batch_size + 1)
    return micro_batch_size // next(divisor for divisor in divisors if micro_batch_size % divisor == 0)


def with_batch(config: RunConfig, micro_batch_size: int, gradient_accumulation_steps: int) -> RunConfig:
    """A copy of `config` with this batch, which is no longer to be chosen."""
    changed = config.model_copy(deep=True)
    changed.train.auto_micro_batch = False
    changed.train.micro_batch_size = micro_batch_size
    changed.train.gradient_accumulation_steps = gradient_accumulation_steps
    return changed


def largest_micro_batch(
    config: RunConfig, world_size: int, precision: str, device: str, limit_bytes: int, rows: int | None = None
) -> BatchChoice:
    """The largest micro-batch whose plan is at most `limit_bytes` per rank; one row where none is.

    A step holds `rows`, or train.global_batch_size, or the configured micro-batch x accumulation x ranks. Raises
    ConfigError when they cannot be dealt out evenly.
    """
    readers = world_size // config.deepspeed.sequence_parallel_size
    composer = Composer(config, precision)
    own = _rows_of_reader(config, readers, rows)
    limited_by = f"the rows of a step, of which each rank has {own} (train.global_batch_size)"
    for micro in (micro for micro in range(own, 0, -1) if own % micro == 0):
        candidate = with_batch(config, micro, own // micro)
        candidate.train.global_batch_size = None
        plan = plan_memory(candidate, world_size, precision, device, composer.json(candidate, world_size))
        if plan.peak_bytes <= limit_bytes or micro == 1:
            break
        limited_by = f"memory: {counted(micro, 'row is', 'rows are')} planned at {format_bytes(plan.peak_bytes)}, and {format_bytes(limit_bytes)} are free"
    return BatchChoice(micro, own // micro, readers, limited_by)


def _rows_of_reader(config: RunConfig, readers: int, rows: int | None) -> int:
    train = config.train
    if rows is None:
        rows = train.global_batch_size or train.micro_batch_size * train.gradient_accumulation_steps * readers
    if rows % readers:
        raise ConfigError(
            f"a step of {counted(rows, 'row')} cannot be dealt out to {counted(readers, 'rank')}; use a number of ranks that divides {rows}, "
            "or set train.global_batch_size"
        )
    return rows // readers
