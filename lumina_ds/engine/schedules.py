"""Learning-rate schedules: pure functions of the step, so a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

from lumina_ds.config.schema import TrainConfig


def learning_rate(step: int, num_steps: int, train: TrainConfig) -> float:
    """Rate of optimizer step `step` (0-based) of a run of `num_steps`.

    A linear warm-up over warmup_ratio reaches the peak, then the named schedule falls from 1 to
    min_lr_ratio times the peak on the last step. wsd stays at the peak until its last decay_ratio of the steps.
    """
    if train.lr_scheduler_type == "onecycle":
        return train.learning_rate * _one_cycle(step, num_steps, train)
    warmup = num_warmup_steps(num_steps, train)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if train.lr_scheduler_type == "wsd":
        return train.learning_rate * _decay_at_the_end(step, num_steps, train)
    progress = (step - warmup) / max(1, num_steps - 1 - warmup)
    return train.learning_rate * SCHEDULES[train.lr_scheduler_type](min(1.0, progress), train.min_lr_ratio)


def num_warmup_steps(num_steps: int, train: TrainConfig) -> int:
    """At least one step whenever a warm-up is asked for."""
    return math.ceil(train.warmup_ratio * num_steps)


def _cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, floor: float) -> float:
    return floor + (1 - floor) * (1 - progress)


def _constant(progress: float, floor: float) -> float:
    return 1.0


def _one_cycle(step: int, num_steps: int, train: TrainConfig) -> float:
    """Cosine up from 1/25 of the peak, then cosine down to min_lr_ratio (Smith and Topin, arXiv 1708.07120).

    The rise takes warmup_ratio of the steps, or 30 % where that is unset (0).
    """
    start = 1 / 25
    rise = max(1, round((train.warmup_ratio or 0.3) * num_steps))
    if step < rise:
        return start + (1 - start) * 0.5 * (1 - math.cos(math.pi * step / rise))
    return _cosine(min(1.0, (step - rise) / max(1, num_steps - 1 - rise)), train.min_lr_ratio)


def _decay_at_the_end(step: int, num_steps: int, train: TrainConfig) -> float:
    """Warm-up, stable, decay: 1 - sqrt over the last decay_ratio of the steps (Hägele et al., arXiv 2405.18392)."""
    decay = max(1, round(train.decay_ratio * num_steps))
    progress = max(0, step + 1 - (num_steps - decay)) / decay
    return 1 - (1 - train.min_lr_ratio) * math.sqrt(min(1.0, progress))


SCHEDULES: dict[str, Callable[[float, float], float]] = {"cosine": _cosine, "linear": _linear, "constant": _constant}
