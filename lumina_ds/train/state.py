"""How far a run has come and how long it is: all that a resumed run goes on from beside its engine.

A RunState goes into the manifest of every checkpoint and comes back from it; a run that resumes, or goes back in the
middle, judges its steps and chooses its rows as the uninterrupted one does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lumina_ds.checkpoint.manifest import RunIdentity, SavedConfig, SavedHealth, SavedRun
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.mixture.order import MixtureOrder
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.errors import ConfigError
from lumina_ds.monitor.metrics import SourceFacts
from lumina_ds.text import counted
from lumina_ds.train.health import StepHealth, Verdict
from lumina_ds.train.step import StepCounts, StepOutcome


@dataclass(frozen=True)
class RunLength:
    """Steps of the whole run, rows of a step over all ranks, and rows after which only empty filler follows, if any.

    With epochs the last batch is filled up with empty rows, so that every row is seen exactly `epochs` times, also when
    the run goes on with more of them.
    """

    num_steps: int
    rows_per_step: int
    total_rows: int | None

    @classmethod
    def of(cls, config: RunConfig, num_rows: int, readers: int) -> RunLength:
        """Of `num_rows` packed rows that `readers` ranks share; ConfigError when there is nothing to train."""
        total_rows = None if config.train.max_steps is not None else round(config.train.epochs * num_rows)
        return cls.of_total(config, total_rows, num_rows, readers)

    @classmethod
    def of_mixture(cls, config: RunConfig, order: MixtureOrder, readers: int) -> RunLength:
        """Of the rows of `order`, which knows how many make the run; ConfigError when there are none, or too few."""
        length = cls.of_total(config, order.total_rows, order.num_rows, readers)
        needed, there = length.num_steps * length.rows_per_step, order.capacity
        if order.total_rows is None and there is not None and there < needed:
            raise ConfigError(
                f"train.max_steps {length.num_steps} of {counted(length.rows_per_step, 'row')} are {counted(needed, 'row')}, and the caps of "
                f"data.sources leave {there:,}; lower --max-steps, or raise a cap"
            )
        return length

    @classmethod
    def of_total(cls, config: RunConfig, total_rows: int | None, num_rows: int, readers: int) -> RunLength:
        """Of so many rows in the whole run, or None where train.max_steps sets its length."""
        train = config.train
        rows_per_step = train.micro_batch_size * train.gradient_accumulation_steps * readers
        if train.max_steps is not None:
            return cls(train.max_steps, rows_per_step, None)
        if not total_rows:
            raise ConfigError(
                f"train.epochs {train.epochs} of {counted(num_rows, 'row')} is no row at all; raise --epochs"
            )
        return cls(math.ceil(total_rows / rows_per_step), rows_per_step, total_rows)

    def after_filling(self, num_filled: int) -> RunLength:
        """Of a run whose shorter lives trained so many empty rows: with epochs, those are no part of its length."""
        if self.total_rows is None:
            return self
        return replace(self, num_steps=math.ceil((self.total_rows + num_filled) / self.rows_per_step))

    def last_step(self, order: TrainingOrder) -> int:
        """Where the whole run ends: rows that are passed over make epochs shorter."""
        positions = order.num_positions
        return self.num_steps if positions is None else math.ceil(positions / self.rows_per_step)


@dataclass
class RunState:
    """Steps done, tokens seen, steps skipped, times gone back; the order of what is still to be read; the history by
    which steps are judged."""

    order: TrainingOrder
    health: StepHealth
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    rollbacks: int = 0

    def advance(self, counts: StepCounts, outcome: StepOutcome) -> Verdict:
        """Count the step just done, and judge it."""
        self.step += 1
        self.tokens += counts.tokens
        self.skipped += outcome.skipped
        return self.health.observe(self.step, outcome.loss, outcome.grad_norm, outcome.skipped)

    def take(self, saved: SavedRun) -> None:
        """Become what it was when `saved` was written."""
        self.step, self.tokens, self.skipped = saved.step, saved.tokens, saved.skipped
        self.rollbacks = saved.health.rollbacks
        self.health = StepHealth(self.health.config, saved.health)
        self.order.passed_over = tuple((first, count) for first, count in saved.health.passed_over)
        self.order.filled = tuple((first, count) for first, count in saved.filled)
        self.order.know(saved.mixture)

    def go_back(self, saved: SavedRun) -> None:
        """Take an earlier state of this run, and keep what was passed over since.

        What is to be passed over now was so before: its positions are those of the order that it was trained in.
        """
        passed_over, rollbacks = self.order.passed_over, self.rollbacks
        self.take(saved)
        self.order.passed_over, self.rollbacks = passed_over, rollbacks + 1

    def saved(
        self,
        identity: RunIdentity,
        config: Mapping[str, Any],
        rows_per_step: int,
        eval_set: str | None,
        eval_loss: float | None,
    ) -> SavedRun:
        """What a checkpoint of this state says of the run, whose configuration is `config`; `eval_loss` is on
        `eval_set`."""
        return SavedRun(
            **dict(identity),
            step=self.step,
            tokens=self.tokens,
            skipped=self.skipped,
            rows=self.step * rows_per_step,
            filled=[list(each) for each in self.order.filled_before(self.step * rows_per_step)],
            mixture=self.order.state_at(self.step * rows_per_step),
            eval_loss=eval_loss if eval_loss is None or math.isfinite(eval_loss) else None,
            eval_set=None if eval_loss is None else eval_set,
            config=SavedConfig.model_validate(config),
            health=SavedHealth(
                losses=self.health.losses,
                grad_norms=self.health.grad_norms,
                skips_in_a_row=self.health.skips_in_a_row,
                rollbacks=self.rollbacks,
                passed_over=[list(each) for each in self.order.passed_over],
            ),
        )

    def epoch(self, rows_per_step: int) -> float:
        """Passes over the data that are complete by now."""
        return self.order.epoch_at(min(self.step * rows_per_step, self.order.num_positions or sys.maxsize))

    def sources(self, rows_per_step: int) -> SourceFacts | None:
        """Where a mixture stands after the step just done, and by which shares the step was chosen; None without one."""
        if not isinstance(self.order, MixtureOrder):
            return None
        end = self.step * rows_per_step
        return SourceFacts(self.order.shares_at(end - 1), self.order.passes_at(end), self.order.reached(end).tokens)

    def step_rows(self, rows_per_step: int) -> list[int]:
        """Packed rows of the step just done, all ranks together; a pure function of the step, so nothing is sent."""
        end = self.step * rows_per_step
        return [self.order.row_at(position) for position in range(end - rows_per_step, end)]
