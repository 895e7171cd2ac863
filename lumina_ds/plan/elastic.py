"""How many of the ranks that could run an elastic run takes: as many as share its steps equally and have the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lumina_ds.config.elastic import for_ranks, layout_fault, possible_ranks
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan.memory import plan_memory
from lumina_ds.text import counted, format_bytes

# Why so many ranks cannot train such a configuration, which is theirs; None when they can.
Fault = Callable[[RunConfig, int], str | None]


@dataclass(frozen=True)
class Choice:
    """`config` is what `num_ranks` ranks train; `why_not_more` says it of the largest number that was passed over."""

    num_ranks: int
    config: RunConfig
    why_not_more: str | None = None


def largest_choice(config: RunConfig, available: int, fault: Fault) -> Choice:
    """The largest number of ranks, at most `available`. Raises ConfigError with the reason where there is none."""
    assert config.run.elastic_range is not None
    fewest, most = config.run.elastic_range
    if available < fewest:
        raise ConfigError(f"--elastic {config.run.elastic} needs {counted(fewest, 'rank')}, and {available} can run")
    wanted = min(available, most)
    why_not = layout_fault(config, wanted)
    for number in (number for number in possible_ranks(config, fewest) if number <= wanted):
        reason = fault(for_ranks(config, number), number)
        if reason is None:
            return Choice(number, for_ranks(config, number), why_not)
        why_not = why_not or reason
    raise ConfigError(f"--elastic {config.run.elastic}, and {available} can run: {why_not}")


def possible_choices(config: RunConfig, fault: Fault) -> tuple[list[int], list[str]]:
    """(numbers of ranks that can train the run, the most first; what those lack that share its steps but cannot).

    Raises ConfigError where the fewest ranks cannot: the run could not go on with them.
    """
    assert config.run.elastic_range is not None
    fewest = config.run.elastic_range[0]
    sharing = list(possible_ranks(config, fewest))
    faults = {n: reason for n in sharing if (reason := fault(for_ranks(config, n), n)) is not None}
    if fewest in faults:
        raise ConfigError(
            f"--elastic {config.run.elastic} cannot go on with its fewest ranks: {faults[fewest]}; raise the {fewest}"
        )
    return [n for n in sharing if n not in faults], list(faults.values())


def memory_fault(config: RunConfig, num_ranks: int, precision: str, device: str, limit_bytes: int) -> str | None:
    """Why `num_ranks` ranks with `limit_bytes` each cannot train `config`, by its plan; None when they can."""
    try:
        plan = plan_memory(config, num_ranks, precision, device)
    except ConfigError as error:
        return f"{counted(num_ranks, 'rank')}: {error}"
    if plan.peak_bytes <= limit_bytes:
        return None
    return (
        f"each of {counted(num_ranks, 'rank')} is planned at {format_bytes(plan.peak_bytes)} of memory, and has "
        f"{format_bytes(limit_bytes)}"
    )
