"""The records of a run: metrics.jsonl with a StepRecord per line, evaluations.jsonl with an EvaluationRecord per line.

A field of StepRecord is the one entry of a metric: metrics.jsonl, metrics.csv, the live line, the trackers and the
report all read it. A metric from outside the package is an entry by `add_metric`, called before the run starts, and
before a report of it is written.
"""

# ruff: noqa: RUF009 - an entry is a dataclass field

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lumina_ds.monitor.metrics import Metric, PerLayer, Plot, StepFacts, perplexity
from lumina_ds.text import GIB, format_bytes

# A damaged line may hold any digits; beyond this it is no step.
_MAX_STEP = 1 << 40


def _entry(*arguments: Any, **options: Any) -> Any:
    """A field of StepRecord that is a metric; the arguments are those of Metric."""
    return field(default=None, metadata={"metric": Metric(*arguments, **options)})


@dataclass
class StepRecord:
    """One step; lists are per MoE layer. None: not recorded, and left out of the line. NaN: null in the line, since
    the value was no finite number.

    The order of the fields is that of the keys in metrics.jsonl and of the columns in metrics.csv.
    """

    step: int = _entry("optimizer steps done", lambda step: step.step, in_csv=True, is_tracked=False)
    time: float | None = _entry("end of the step", lambda step: step.time, "seconds since 1970", is_tracked=False)
    epoch: float | None = _entry(
        "passes over the rows", lambda step: step.epoch, in_csv=True, figure="epoch {:.2f}".format
    )
    loss: float | None = _entry(
        "mean loss of the label tokens; null in a step without one",
        lambda step: _loss(step),
        "nats per token",
        in_csv=True,
        figure="loss {:.4f}".format,
        plot=Plot("Training loss", section="loss", from_zero=False, may_be_log=True, drawn="always"),
    )
    perplexity: float | None = _entry(
        "exp(loss)", lambda step: perplexity(_loss(step)), in_csv=True, figure="PPL {:.2f}".format
    )
    learning_rate: float | None = _entry(
        "rate of the step",
        lambda step: step.learning_rate,
        in_csv=True,
        figure="LR {:.2e}".format,
        plot=Plot("Learning rate", drawn="always"),
    )
    grad_norm: float | None = _entry(
        "norm of all gradients before clipping",
        lambda step: step.outcome.grad_norm,
        in_csv=True,
        figure="grad {:.3f}".format,
        plot=Plot("Gradient norm", "before clipping", from_zero=False, may_be_log=True, drawn="always"),
    )
    load_balancing_loss: float | None = _entry(
        "of the step as one batch, mean of the MoE layers; 1 is even",
        lambda step: step.outcome.load_balancing_loss,
        in_csv=True,
        plot=Plot("Load-balancing loss", "1 is even", "experts", from_zero=False, drawn="always"),
    )
    router_z_loss: float | None = _entry(
        "mean of the MoE layers",
        lambda step: step.outcome.router_z_loss,
        in_csv=True,
        plot=Plot("Router z-loss", section="experts", from_zero=False, drawn="always"),
    )
    tokens: int | None = _entry("tokens of the run so far", lambda step: step.tokens, "tokens", in_csv=True)
    trained_tokens: int | None = _entry("label tokens", lambda step: step.counts.trained_tokens, "tokens")
    step_seconds: float | None = _entry(
        "wall time",
        lambda step: step.seconds,
        "seconds",
        plot=Plot("Time of a step", "seconds", drawn="always"),
    )
    tokens_per_second: float | None = _entry(
        "of all ranks together",
        lambda step: step.counts.tokens / step.seconds,
        "tokens per second",
        in_csv=True,
        figure="{:,.0f} tok/s".format,
        plot=Plot("Speed", "tokens per second, all ranks", drawn="always"),
    )
    data_seconds: float | None = _entry(
        "waiting for the rows",
        lambda step: step.data_seconds,
        "seconds",
        in_csv=True,
        plot=Plot("Waiting for data", "milliseconds per step", divisor=1e-3, drawn="always"),
    )
    memory_bytes: int | None = _entry(
        "peak on the card of rank 0, or resident memory of its process",
        lambda step: step.memory_bytes,
        "bytes",
        in_csv=True,
        figure=lambda value: f"mem {format_bytes(value)}",
        plot=Plot("Memory of rank 0", "GiB", divisor=GIB, drawn="always"),
    )
    skipped: int | None = _entry(
        "steps of the run so far that changed nothing, for non-finite gradients",
        lambda step: step.skipped,
        "steps",
        in_csv=True,
        plot=Plot("Skipped steps", "so far", drawn="where not zero"),
    )
    anomaly_score: float | None = _entry(
        "how far loss or gradient norm lie above the recent steps",
        lambda step: step.anomaly_score,
        "robust standard deviations",
        in_csv=True,
        plot=Plot("Anomaly", "deviations above the median of recent steps", "health"),
    )
    host_memory_bytes: int | None = _entry(
        "resident memory of rank 0", lambda step: step.machine.get("host_memory_bytes"), "bytes"
    )
    host_memory_available_bytes: int | None = _entry(
        "free memory of the host",
        lambda step: step.machine.get("host_memory_available_bytes"),
        "bytes",
        in_csv=True,
        plot=Plot("Free memory of the host", "GiB", "health", GIB),
    )
    disk_free_bytes: int | None = _entry(
        "free space on the run folder's disk",
        lambda step: step.machine.get("disk_free_bytes"),
        "bytes",
        in_csv=True,
        plot=Plot("Free space on the disk", "GiB", "health", GIB),
    )
    slowest_rank: int | None = _entry(
        "rank with the most work of its own", lambda step: step.machine.get("slowest_rank")
    )
    straggler_ratio: float | None = _entry(
        "work of the slowest rank over the median rank's",
        lambda step: step.machine.get("straggler_ratio"),
        plot=Plot("Slowest rank", "its work over the median rank's", "health"),
    )
    expert_usage: list[list[float]] | None = _entry(
        "share of the choices per expert, before any is dropped or rerouted",
        lambda step: step.outcome.routing.expert_usage,
        is_tracked=False,
        plot=Plot("Busiest expert of any layer", "load over an even share", "experts", drawn="always"),
    )
    usage_entropy: list[float] | None = _entry(
        "entropy of the shares; 1 is even",
        lambda step: step.outcome.routing.usage_entropy,
        layers=PerLayer("usage entropy", "{:.3f}"),
    )
    router_entropy: list[float | None] | None = _entry(
        "mean entropy of a token's probabilities; 1 is undecided",
        lambda step: step.outcome.routing.router_entropy,
        plot=Plot("Entropy of a token's probabilities", "lowest layer, 1 is undecided", "experts"),
        layers=PerLayer("router entropy", "{:.3f}", min),
    )
    max_violation: list[float] | None = _entry(
        "load of the busiest expert over an even share, minus one (arXiv 2408.15664)",
        lambda step: step.outcome.routing.max_violation,
        layers=PerLayer("maximum violation", "{:.2f}"),
    )
    dead_experts: list[int] | None = _entry(
        "experts that no token chose",
        lambda step: step.outcome.routing.dead_experts,
        plot=Plot("Experts that no token chose", "all layers", "experts"),
        layers=PerLayer("dead", "{:.0f}", sum),
    )
    dropped_share: list[float] | None = _entry(
        "share of the choices that found no room and were dropped",
        lambda step: step.outcome.routing.dropped_share if _can_overflow(step) else None,
        plot=Plot("Dropped choices", "percent, worst layer", "experts", 0.01),
        layers=PerLayer("dropped", "{:.2%}", max),
    )
    rerouted_share: list[float] | None = _entry(
        "share of the choices that found no room and went to another expert",
        lambda step: step.outcome.routing.rerouted_share if _can_overflow(step) else None,
        plot=Plot("Rerouted choices", "percent, worst layer", "experts", 0.01),
        layers=PerLayer("rerouted", "{:.2%}", max),
    )
    capacity_factor: list[float] | None = _entry(
        "of the step to come, where it follows overflow",
        lambda step: step.outcome.routing.capacity_factor or None,
        plot=Plot("Capacity factor", "highest layer", "experts"),
        layers=PerLayer("capacity factor", "{:.3f}", max),
    )
    source_loss: dict[str, float | None] | None = _entry(
        "mean loss of the label tokens by source; null for one without any in the step",
        lambda step: _losses_by_source(step),
        "nats per token",
        figure=lambda losses: _figure_by_source(losses),
    )
    source_trained_tokens: dict[str, int] | None = _entry(
        "label tokens by source", lambda step: step.sources and _by_source(step, step.counts.labels_by_source), "tokens"
    )
    source_tokens: dict[str, int] | None = _entry(
        "tokens of the run so far by source, those passed over with them",
        lambda step: step.sources and dict(step.sources.tokens),
        "tokens",
    )
    source_epochs: dict[str, float] | None = _entry(
        "passes over each source's rows so far", lambda step: step.sources and dict(step.sources.passes)
    )
    source_shares: dict[str, float] | None = _entry(
        "share of the tokens that each source is to have in the step; a change is seen where it begins",
        lambda step: step.sources and dict(step.sources.shares),
    )
    samples: list[int] | None = _entry("packed rows of all ranks", lambda step: step.samples, is_tracked=False)
    # Added metrics, and keys that a file of another version has.
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: StepFacts) -> StepRecord:
        """Every metric of the step that is just done."""
        return cls._of_values({name: metric.of(facts) for name, metric in METRICS.items()})

    @classmethod
    def read(cls, values: Any) -> StepRecord | None:
        """The record of a line's JSON value; None where that is no object with the step of a run."""
        if step_of(values) is None:
            return None
        return cls._of_values({name: _typed(name, value) for name, value in values.items()})

    @classmethod
    def _of_values(cls, values: dict[str, Any]) -> StepRecord:
        own = {name: value for name, value in values.items() if name in _OWN}
        return cls(**own, others={name: value for name, value in values.items() if name not in _OWN})

    def value(self, name: str) -> Any:
        """A metric's value by its name; None where the record has none."""
        return getattr(self, name) if name in _OWN else self.others.get(name)

    def values(self) -> dict[str, Any]:
        """Keys and values as a line of metrics.jsonl has them."""
        own = {name: getattr(self, name) for name in _OWN}
        return {name: value for name, value in (own | self.others).items() if value is not None}


@dataclass
class EvaluationRecord:
    """The evaluation after `step` steps: mean loss of the label tokens in nats, and how many there were.

    `name` is that of the set where there are several, or `mean` for the mean of all.
    """

    step: int
    loss: float
    perplexity: float = math.nan
    trained_tokens: int = 0
    name: str | None = None

    @classmethod
    def read(cls, values: Any) -> EvaluationRecord | None:
        """The record of a line's JSON value; None where that is no object with the step of a run."""
        step = step_of(values)
        if step is None:
            return None
        loss, perplexity, trained = (_number(values.get(key)) for key in ("loss", "perplexity", "trained_tokens"))
        name = values.get("name")
        return cls(step, loss, perplexity, trained, name if isinstance(name, str) else None)

    def values(self) -> dict[str, Any]:
        """Keys and values as a line of evaluations.jsonl has them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


# Every metric by its name, in the order of the keys.
METRICS: dict[str, Metric] = {one.name: one.metadata["metric"] for one in fields(StepRecord) if one.metadata}
_OWN = tuple(METRICS)
_LISTS = {one.name for one in fields(StepRecord) if str(one.type).startswith("list[")}
_BY_SOURCE = {one.name for one in fields(StepRecord) if str(one.type).startswith("dict[")} - {"others"}


def add_metric(name: str, metric: Metric) -> None:
    """Record and show a metric of your own, after ours. ValueError where the name is taken."""
    if name in METRICS or name == "others":
        raise ValueError(f"there is a metric {name} already; choose another name")
    METRICS[name] = metric


def step_of(values: Any) -> int | None:
    """The step that a line's JSON value is about; None where it is no record of a run."""
    step = values.get("step") if isinstance(values, dict) else None
    return step if type(step) is int and 0 <= step < _MAX_STEP else None


def _loss(step: StepFacts) -> float:
    """NaN where no token was a label: the mean of nothing is not 0, which would look like a perfect step."""
    return step.outcome.loss if step.counts.trained_tokens else math.nan


def _by_source(step: StepFacts, values: Sequence[Any]) -> dict[str, Any]:
    """Values in the order of the sources' names, by name."""
    assert step.sources is not None
    return dict(zip(step.sources.shares, values, strict=True))


def _losses_by_source(step: StepFacts) -> dict[str, float | None] | None:
    if step.sources is None:
        return None
    sums = zip(step.outcome.losses_by_source, step.counts.labels_by_source, strict=True)
    return _by_source(step, [_finite(loss / count) if count else None for loss, count in sums])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _figure_by_source(losses: dict[str, float | None]) -> str:
    shown = (f"{name} {'none' if loss is None else f'{loss:.4f}'}" for name, loss in losses.items())
    return f"by source {', '.join(shown)}"


def _can_overflow(step: StepFacts) -> bool:
    return step.config.model.overflow_policy != "dropless"


def _typed(name: str, value: Any) -> Any:
    """The value as its metric has it: NaN for a number that is null or damaged; None for a list that is none."""
    if name not in METRICS:
        return value
    if name in _BY_SOURCE:
        return {key: _number(each) for key, each in value.items()} if isinstance(value, dict) else None
    if name in _LISTS:
        return value if isinstance(value, list) else None
    return _number(value) if name in _OWN or value is None else value


def _number(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
