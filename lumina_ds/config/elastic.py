"""Runs whose number of ranks changes while they go on (run.elastic): which numbers can be, and the layout of each.

Whatever the number, a step holds the same micro-batches with the same rows in them, as many as --batch-size and
--grad-accum make with the most ranks. Fewer ranks accumulate more of them: so samples stay, and losses but for the order
in which they are summed.
"""

from __future__ import annotations

from collections.abc import Iterator

from lumina_ds.config.checks import expert_faults
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.text import counted


def elastic_faults(config: RunConfig) -> list[str]:
    """What contradicts run.elastic, however many ranks there will be."""
    if config.run.elastic_range is None:
        return []
    fewest, most = config.run.elastic_range
    train, sharing = config.train, config.deepspeed.sequence_parallel_size
    if fewest > most:
        return [f"--elastic {config.run.elastic} asks for at least {fewest} and at most {most} ranks; exchange the two"]
    if train.auto_micro_batch:
        return [
            f"--elastic {config.run.elastic} keeps the micro-batch whatever the number of ranks, and --batch-size auto "
            "would choose one for each; give --batch-size a number"
        ]
    # For its own size, so that only the number of experts is judged.
    faults = expert_faults(config, config.deepspeed.expert_parallel_size)
    if most % sharing:
        return [*faults, f"{most} ranks, the most of --elastic, are not divisible by --sequence-parallel {sharing}"]
    rows = micro_batches(config) * train.micro_batch_size
    if train.global_batch_size not in (None, rows):
        faults.append(
            f"the batch equation does not hold: train.global_batch_size {train.global_batch_size} is not "
            f"micro_batch_size {train.micro_batch_size} x gradient_accumulation_steps "
            f"{train.gradient_accumulation_steps} x {most // sharing} ranks, the most of --elastic, = {rows}; set it to "
            f"{rows} or drop it"
        )
    if fault := layout_fault(config, fewest):
        faults.append(f"--elastic {config.run.elastic}: {fault}")
    return faults


def micro_batches(config: RunConfig) -> int:
    """Micro-batches of a step, all ranks together. `config` has run.elastic."""
    assert config.run.elastic_range is not None
    readers = config.run.elastic_range[1] // config.deepspeed.sequence_parallel_size
    return config.train.gradient_accumulation_steps * readers


def layout_fault(config: RunConfig, num_ranks: int) -> str | None:
    """Why so many ranks cannot share the steps of this run; None when they can."""
    assert config.run.elastic_range is not None
    fewest, most = config.run.elastic_range
    sharing, count = config.deepspeed.sequence_parallel_size, micro_batches(config)
    if not fewest <= num_ranks <= most:
        return f"{_ranks(num_ranks)} outside of --elastic {config.run.elastic}"
    if num_ranks % sharing:
        return f"{_ranks(num_ranks)} not divisible by --sequence-parallel {sharing}"
    if count % (num_ranks // sharing):
        return (
            f"{num_ranks} ranks cannot share the {count} micro-batches of a step equally (--grad-accum x the most "
            f"ranks); {_listed([*possible_ranks(config, 1)][::-1])} can"
        )
    return None


def possible_ranks(config: RunConfig, fewest: int) -> Iterator[int]:
    """The numbers of ranks without a `layout_fault`, the most first; `fewest` instead of the run's own."""
    assert config.run.elastic_range is not None
    sharing, count = config.deepspeed.sequence_parallel_size, micro_batches(config)
    numbers = range(config.run.elastic_range[1], fewest - 1, -1)
    return (number for number in numbers if number % sharing == 0 and count % (number // sharing) == 0)


def for_ranks(config: RunConfig, num_ranks: int) -> RunConfig:
    """What `num_ranks` ranks of an elastic run train: an ordinary configuration with their accumulation, and the largest
    expert-parallel size up to the one asked for that divides ranks and experts.

    `config` itself where it is not elastic. Raises ConfigError for a number with a `layout_fault`.
    """
    if config.run.elastic_range is None:
        return config
    if fault := layout_fault(config, num_ranks):
        raise ConfigError(fault)
    deepspeed, experts = config.deepspeed, config.model.num_experts
    changed = config.model_copy(deep=True)
    changed.run.elastic = None
    changed.train.gradient_accumulation_steps = micro_batches(config) * deepspeed.sequence_parallel_size // num_ranks
    sizes = range(deepspeed.expert_parallel_size, 0, -1)
    changed.deepspeed.expert_parallel_size = next(n for n in sizes if num_ranks % n == 0 and experts % n == 0)
    return changed


def describe_layout(config: RunConfig, num_ranks: int) -> str:
    """`2 ranks (--grad-accum 4, --expert-parallel 2)`."""
    layout = for_ranks(config, num_ranks)
    experts = f", --expert-parallel {layout.deepspeed.expert_parallel_size}" if config.model.num_experts else ""
    return f"{counted(num_ranks, 'rank')} (--grad-accum {layout.train.gradient_accumulation_steps}{experts})"


def _ranks(number: int) -> str:
    return "1 rank is" if number == 1 else f"{number} ranks are"


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
