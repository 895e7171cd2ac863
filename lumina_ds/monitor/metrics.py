"""What a metric is: its meaning, where its value comes from, and where people see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lumina_ds.config.schema import RunConfig

# Sections of a run's report; `loss` is drawn by itself there, together with the evaluations.
Section = Literal["loss", "course", "health", "experts"]


@dataclass(frozen=True)
class SourceFacts:
    """Of each source of a mixture: the share of the tokens that it is to have, the passes over its rows and its tokens
    in the run so far, those passed over with them."""

    shares: Mapping[str, float]
    passes: Mapping[str, float]
    tokens: Mapping[str, int]


@dataclass(frozen=True)
class StepFacts:
    """What the loop knows when a step is done; every metric of the step is made from it.

    `counts` is what all ranks brought to the step (StepCounts) and `outcome` what became of it (StepOutcome), both of
    train/step.py. `machine` holds the watchdog's last figures. Metrics are made on rank 0 alone, so a collective would
    wait for ever.
    """

    step: int
    time: float  # seconds since 1970
    epoch: float
    tokens: int  # of the run so far
    skipped: int  # of the run so far
    learning_rate: float
    seconds: float
    data_seconds: float  # of them waiting for the step's rows
    memory_bytes: int
    anomaly_score: float
    counts: Any
    outcome: Any
    config: RunConfig
    machine: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[int] | None = None
    sources: SourceFacts | None = None


@dataclass(frozen=True)
class Plot:
    """How a report draws a metric. Recorded values are divided by `divisor`; `unit` stands beside the title.

    `may_be_log`: the axis is logarithmic where the values span decades, and the reader can switch.
    """

    title: str
    unit: str = ""
    section: Section = "course"
    divisor: float = 1.0
    from_zero: bool = True
    may_be_log: bool = False
    drawn: Literal["always", "where recorded", "where not zero"] = "where recorded"


@dataclass(frozen=True)
class PerLayer:
    """A metric with one number per MoE layer: its column in the report's table, and how the layers make one curve."""

    heading: str
    format: str
    curve: Callable[[Sequence[float]], float] | None = None


@dataclass(frozen=True)
class Metric:
    """One quantity of a step.

    `of` makes the value; None where there is none, and then nothing is recorded. `unit` is that of the record.
    `figure` gives the text on the live line. `is_tracked`: whether TensorBoard and W&B draw it.
    """

    meaning: str
    of: Callable[[StepFacts], Any]
    unit: str = ""
    in_csv: bool = False
    figure: Callable[[Any], str] | None = None
    is_tracked: bool = True
    plot: Plot | None = None
    layers: PerLayer | None = None

    def curve_value(self, value: Any) -> Any:
        """The number that a curve takes: of a list per MoE layer what `layers` says; None where it says nothing."""
        if self.layers is None:
            return value
        if self.layers.curve is None or not is_per_layer(value):
            return None
        return self.layers.curve(value)


def is_per_layer(value: Any) -> bool:
    """Whether `value` is a list with a number for every MoE layer."""
    return isinstance(value, list) and bool(value) and all(type(each) in (int, float) for each in value)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows; NaN of NaN."""
    return math.inf if loss >= 700 else math.exp(loss)
