"""What contradicts itself in `data.sources` and `data.eval_sets`; one sentence per fault, nothing is raised here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lumina_ds.config.mixtures import AMOUNTS, MEAN_OF_SETS, PLAIN_EVAL_SET, EvalSetConfig, SourceConfig
from lumina_ds.config.schema import DataConfig, RunConfig
from lumina_ds.text import nearest


def mixture_faults(config: RunConfig) -> list[str]:
    """Faults of the mixture and of the evaluation sets."""
    data = config.data
    faults = [*_entry_faults("data.sources", data.sources), *_entry_faults("data.eval_sets", data.eval_sets)]
    faults += [*_amount_faults(data), *_set_faults(data)]
    if config.data.sources and _wants_fused_loss(config):
        faults.append(
            f"train.fused_kernels {config.train.fused_kernels} has a loss that does not tell sources apart, and "
            "data.sources are given; leave cross_entropy out, or set auto"
        )
    return faults


def best_by_fault(best_by: str | None, names: Sequence[str]) -> str | None:
    """What is wrong with train.best_by where the evaluation sets have these names; None for nothing."""
    if best_by is None or best_by in names or (best_by == MEAN_OF_SETS and names):
        return None
    have = f"the evaluation sets are {', '.join(names)}, and {MEAN_OF_SETS} is of all" if names else "there is none"
    return f"train.best_by {best_by} names no evaluation set{nearest(best_by, [*names, MEAN_OF_SETS])}; {have}"


def _wants_fused_loss(config: RunConfig) -> bool:
    asked = config.train.fused_kernels
    return asked not in ("auto", "off") and (asked == "on" or "cross_entropy" in asked)


def _entry_faults(field: str, entries: Sequence[SourceConfig] | Sequence[EvalSetConfig]) -> Iterator[str]:
    for name, count in Counter(entry.name for entry in entries).items():
        if count > 1:
            yield f"{field}: {count} entries are named {name}; give each a name of its own"
    for entry in entries:
        if bool(entry.paths) == bool(entry.shards):
            have = "both paths and shards" if entry.paths else "neither paths nor shards"
            yield f"{field}: {entry.name} has {have}; give it one of them"
        if entry.format is not None and entry.shards:
            yield f"{field}: {entry.name} has a format, and shards are finished; leave it out"


def _amount_faults(data: DataConfig) -> Iterator[str]:
    sources = data.sources
    if data.temperature is not None and not sources:
        yield f"data.temperature {data.temperature} bends the shares of data.sources, and there are none; leave it out"
    if not sources:
        return
    for field, given in (("train_data", data.train_data), ("shards", data.shards)):
        if given:
            yield f"data.sources and data.{field} are both given; make the latter a source too, or leave one of them out"
    for source in sources:
        amounts = [name for name in AMOUNTS if getattr(source, name) is not None]
        if len(amounts) > 1:
            yield f"data.sources: {source.name} has {' and '.join(amounts)}, which say the same thing twice; keep one"
    weighted = [source.name for source in sources if source.weight is not None]
    others = [source.name for source in sources if source.weight is None]
    if weighted and others:
        yield (
            f"data.sources: {weighted[0]} has a weight and {others[0]} has none; give every source a weight, or use "
            "tokens or repeats"
        )
    elif weighted and not any(source.weight for source in sources):
        yield "data.sources: every weight is 0, so there is nothing to train on; raise one"
    named = [f"{source.name} has {source.amount}" for source in sources if source.amount]
    if data.temperature is not None and named:
        yield (
            f"data.temperature {data.temperature} sets the shares by the sources' sizes, and {named[0]}; leave one of "
            "them out"
        )


def _set_faults(data: DataConfig) -> Iterator[str]:
    names = [entry.name for entry in data.eval_sets]
    if MEAN_OF_SETS in names:
        yield f"data.eval_sets: {MEAN_OF_SETS} is the name of the mean of all sets; choose another one"
    if PLAIN_EVAL_SET in names:
        yield (
            f"data.eval_sets: {PLAIN_EVAL_SET} is the name of what data.eval_data, data.eval_shards and "
            "data.eval_fraction give; choose another one"
        )
    if data.sources and data.eval_fraction and (names or data.eval_data or data.eval_shards):
        yield (
            f"data.eval_fraction {data.eval_fraction} holds out a part of every source where no other evaluation data "
            "is named; leave one of them out"
        )
    if names and not any(entry.weight for entry in data.eval_sets) and not (data.eval_data or data.eval_shards):
        yield "data.eval_sets: every weight is 0, so their mean has no meaning; raise one"
