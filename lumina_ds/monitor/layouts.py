"""The layouts that an elastic run has had: a line of logs/layouts.jsonl for each of its lives."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lumina_ds.monitor.records import step_of


@dataclass(frozen=True)
class LayoutRecord:
    """What a life that goes on after `step` began with, at `time`, in seconds since the epoch."""

    step: int
    time: float
    ranks: int
    zero_stage: int
    expert_parallel_size: int
    gradient_accumulation_steps: int

    @classmethod
    def read(cls, values: Any) -> LayoutRecord | None:
        """The record of a line's JSON value; None where it is none."""
        if step_of(values) is None:
            return None
        found = {one.name: values.get(one.name) for one in fields(cls)}
        return cls(**found) if all(type(value) in (int, float) for value in found.values()) else None
