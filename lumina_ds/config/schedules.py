"""The curves of the learning rate: how much of its peak each step has. Pure functions, so a resumed run needs no state.

To add one, add an entry to SCHEDULES; `train.lr_scheduler_type` then takes its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """What a curve stretches over.

    `floor` is the last rate over the peak, `decay_ratio` the share of the steps in which a curve that falls at the end
    does so. The first `num_warmup` of `num_steps` are `warmup_ratio` of them, rounded up.
    """

    num_steps: int
    num_warmup: int
    warmup_ratio: float
    floor: float
    decay_ratio: float

    def progress(self, step: int) -> float:
        """From 0 at the first step after the warm-up to 1 at the last one."""
        return min(1.0, (step - self.num_warmup) / max(1, self.num_steps - 1 - self.num_warmup))


@dataclass(frozen=True)
class Schedule:
    """`share(step, span)` is the rate of a step (0-based) over the peak. A linear warm-up comes before it, unless the
    curve rises by itself."""

    share: Callable[[int, Span], float]
    warms_up: bool = True


def _cosine(step: int, span: Span) -> float:
    return _half_cosine(span.progress(step), span.floor)


def _linear(step: int, span: Span) -> float:
    return span.floor + (1 - span.floor) * (1 - span.progress(step))


def _constant(step: int, span: Span) -> float:
    return 1.0


def _one_cycle(step: int, span: Span) -> float:
    """Cosine up from 1/25 of the peak, then cosine down to the floor (Smith and Topin, arXiv 1708.07120).

    The rise takes warmup_ratio of the steps, or 30 % where that is unset (0).
    """
    start = 1 / 25
    rise = max(1, round((span.warmup_ratio or 0.3) * span.num_steps))
    if step < rise:
        return start + (1 - start) * 0.5 * (1 - math.cos(math.pi * step / rise))
    return _half_cosine(min(1.0, (step - rise) / max(1, span.num_steps - 1 - rise)), span.floor)


def _decay_at_the_end(step: int, span: Span) -> float:
    """Warm-up, stable, decay: 1 - sqrt over the last decay_ratio of the steps (Hägele et al., arXiv 2405.18392)."""
    decay = max(1, round(span.decay_ratio * span.num_steps))
    progress = max(0, step + 1 - (span.num_steps - decay)) / decay
    return 1 - (1 - span.floor) * math.sqrt(min(1.0, progress))


def _half_cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(_cosine),
    "linear": Schedule(_linear),
    "onecycle": Schedule(_one_cycle, warms_up=False),
    "wsd": Schedule(_decay_at_the_end),
    "constant": Schedule(_constant),
}
