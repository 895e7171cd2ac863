"""What each step says about the run's health, and what follows: nothing, a skip, going back, or giving up.

Every rank sees the same global loss and gradient norm and keeps the same history, so all come to the same
verdict without asking one another. The history is part of a checkpoint: a resumed run judges as the
uninterrupted one would.

Loss and gradient norm are held against the median and median absolute deviation of their recent past, because they
do not move when one of a hundred values is wild: with mean and standard deviation the first spike hides the second.
Only upward counts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from lumina_ds.checkpoint.manifest import SavedHealth
from lumina_ds.config.schema import HealthConfig
from lumina_ds.text import counted

# A normal distribution's standard deviation over its median absolute deviation.
_DEVIATIONS_PER_MAD = 1.4826
# A loss moves little from step to step, a gradient norm by a multiple.
_LOSS_NOISE = 0.02
_NORM_NOISE = 0.25


@dataclass(frozen=True)
class Verdict:
    """On one step. `message` is for the log; `bad_steps`, if any, are to be gone back before and passed over.

    `ends_run`: there is no going on, for the reason that `message` gives.
    """

    anomaly_score: float
    message: str | None = None
    bad_steps: int = 0
    ends_run: bool = False


class StepHealth:
    """Judges steps by the policies of the section `health`."""

    def __init__(self, config: HealthConfig, saved: SavedHealth | None = None) -> None:
        """`saved` is the history in the checkpoint that is resumed from."""
        self.config = config
        limits = (config.spike_threshold, config.spike_window_steps, config.spike_warmup_steps)
        self._loss = SpikeDetector(*limits, _LOSS_NOISE, saved.losses if saved else ())
        self._norm = SpikeDetector(*limits, _NORM_NOISE, saved.grad_norms if saved else ())
        self.skips_in_a_row = saved.skips_in_a_row if saved else 0

    @property
    def judges_before_the_update(self) -> bool:
        """Whether a step must be judged before its update is applied, which costs one more synchronisation."""
        return self.config.spike_policy == "skip"

    @property
    def losses(self) -> list[float]:
        """Those of the recent steps that were sound, for the checkpoint's manifest."""
        return self._loss.values

    @property
    def grad_norms(self) -> list[float]:
        """As `losses`."""
        return self._norm.values

    def refuses_loss(self, loss: float) -> bool:
        """Policy skip: whether the step of this global loss is not to be applied."""
        return self._loss.is_spike(loss)

    def refuses_norm(self, norm: float) -> bool:
        """Policy skip: whether a gradient of this global norm is not to be applied."""
        return self._norm.is_spike(norm)

    def observe(self, step: int, loss: float, grad_norm: float, skipped: bool) -> Verdict:
        """Take a finished step, counted from 1."""
        scores = [self._loss.score(loss), self._norm.score(grad_norm)]
        spikes = [
            f"{name} {value:.4g} is {score:.1f} deviations above its recent median"
            for name, value, score in (("loss", loss, scores[0]), ("gradient norm", grad_norm, scores[1]))
            if self.config.spike_threshold < score < math.inf
        ]
        # A refused loss leaves no gradient norm: then the loss alone has a score.
        score = max((each for each in scores if math.isfinite(each) or not spikes), default=math.inf)
        if skipped:
            return self._skipped(step, score, " and ".join(spikes))
        self.skips_in_a_row = 0
        if not spikes:
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self._loss.learn(loss)
                self._norm.learn(grad_norm)
            return Verdict(score)
        message = f"step {step} is a spike: {' and '.join(spikes)}"
        back = self.config.rollback_skip_steps if self.config.spike_policy == "rollback" else 0
        return Verdict(score, message, back)

    def _skipped(self, step: int, score: float, spike: str) -> Verdict:
        self.skips_in_a_row += 1
        why = spike or "its loss or gradient is not finite"
        message = f"step {step} was skipped on all ranks: {why}"
        if self.skips_in_a_row <= self.config.max_consecutive_skips:
            return Verdict(score, message)
        if self.config.spike_policy == "rollback":
            return Verdict(score, f"{message}; {self.skips_in_a_row} in a row", self.skips_in_a_row)
        advice = "lower --learning-rate, use --precision fp32, or set --health.spike_policy rollback"
        in_a_row = f"{counted(self.skips_in_a_row, 'step')} in a row {'was' if self.skips_in_a_row == 1 else 'were'} skipped, the last at step {step} ({why})"
        return Verdict(score, f"{in_a_row}; {advice}", ends_run=True)


class SpikeDetector:
    """Scores one quantity step by step. Values that were spikes, or not finite, are not learned from."""

    def __init__(
        self, threshold: float, window: int, warmup: int, noise_floor: float, values: Iterable[float] = ()
    ) -> None:
        """`noise_floor`: the standard deviation is taken for at least this share of the median.

        `values` are those of an earlier life, as `values` gave them, so that a resumed run judges alike.
        """
        self.threshold = threshold
        self.warmup = warmup
        self.noise_floor = noise_floor
        self._values: deque[float] = deque(values, maxlen=window)

    @property
    def values(self) -> list[float]:
        return list(self._values)

    def score(self, value: float) -> float:
        """Robust standard deviations above the median; 0 below it or before the warm-up, infinite if not finite."""
        if not math.isfinite(value):
            return math.inf
        if len(self._values) < self.warmup:
            return 0.0
        middle = median(self._values)
        spread = _DEVIATIONS_PER_MAD * median(abs(each - middle) for each in self._values)
        return max(0.0, value - middle) / max(spread, self.noise_floor * abs(middle), 1e-12)

    def is_spike(self, value: float) -> bool:
        """Whether a finite value is out of line; non-finite ones have a rule of their own."""
        return math.isfinite(value) and self.score(value) > self.threshold

    def learn(self, value: float) -> None:
        self._values.append(value)
