"""The learning rate of a step: a warm-up, then one of the curves of config/schedules.py."""

from __future__ import annotations

import math

from lumina_ds.config.schedules import SCHEDULES, Span
from lumina_ds.config.schema import TrainConfig


def learning_rate(step: int, num_steps: int, train: TrainConfig) -> float:
    """Rate of optimizer step `step` (0-based) of a run of `num_steps`.

    A linear warm-up over warmup_ratio reaches the peak, then the named schedule falls from 1 to
    min_lr_ratio times the peak on the last step. wsd stays at the peak until its last decay_ratio of the steps.
    """
    schedule, warmup = SCHEDULES[train.lr_scheduler_type], num_warmup_steps(num_steps, train)
    if schedule.warms_up and step < warmup:
        return train.learning_rate * (step + 1) / warmup
    span = Span(num_steps, warmup, train.warmup_ratio, train.min_lr_ratio, train.decay_ratio)
    return train.learning_rate * schedule.share(step, span)


def num_warmup_steps(num_steps: int, train: TrainConfig) -> int:
    """At least one step whenever a warm-up is asked for."""
    return math.ceil(train.warmup_ratio * num_steps)
