"""An optimizer step that leaves the state before it whole until its update begins.

Until then the step may be given up on all ranks alike because of a stop, or the state may be saved from another thread
(train/watch/long_steps.py) or after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lumina_ds.checkpoint.state import random_state, set_random_state
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import MicroBatch
from lumina_ds.engine.deepspeed.gradient_norm import NormGate
from lumina_ds.engine.world import World
from lumina_ds.train.state import RunState
from lumina_ds.train.step import StepCounts, StepOutcome, any_rank, run_step
from lumina_ds.train.watch.long_steps import UpdateGuard


class StopBetweenBatches(Exception):
    """Leaves a step or an evaluation on all ranks together, because a stop was asked for."""


class StepFailed(Exception):
    """`error` came before the update of the only rank: the state before the step is whole."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class GuardedStep:
    """The steps of one engine. While `run` computes, `guard` lets another thread hold the update back."""

    def __init__(
        self, engine: Any, config: RunConfig, world: World, state: RunState, stop_requested: Callable[[], bool]
    ) -> None:
        """Where the policy is to skip spikes, the health of `state` may refuse a step before its update."""
        self.guard = UpdateGuard()
        self._engine, self._config, self._world, self._state = engine, config, world, state
        self._stop_requested = stop_requested
        self._updating = False
        self._norm_gate: NormGate | None = None
        if state.health.judges_before_the_update:
            self._norm_gate = NormGate(engine, lambda norm: state.health.refuses_norm(norm))

    def run(self, batches: Sequence[MicroBatch], counts: StepCounts) -> StepOutcome:
        """One step. Raises StopBetweenBatches, StepFailed, or what a rank among several met. A collective."""
        before = random_state()
        try:
            with self.guard.unchanged(self._state.step, before):
                outcome = run_step(
                    *(self._engine, batches, counts, self._config.model, self._config.train.max_grad_norm),
                    *(self._world, self._state.health if self._norm_gate else None),
                    between_batches=self.leave_if_stopped if counts.slow else lambda: None,
                    before_update=self._begin_update,
                )
        except StopBetweenBatches:
            set_random_state(before)
            raise
        except Exception as error:
            # Of several ranks the others are inside a collective, where nothing reaches them.
            if self._world.size > 1 or self._updating:
                raise
            set_random_state(before)
            raise StepFailed(error) from error
        self._updating = False
        refused = self._norm_gate.take_refused() if self._norm_gate else None
        return outcome if refused is None else replace(outcome, grad_norm=refused)

    def leave_if_stopped(self) -> None:
        """Raise StopBetweenBatches on all ranks when any was asked to stop. A collective."""
        if any_rank(self._stop_requested(), self._world):
            raise StopBetweenBatches

    def _begin_update(self) -> None:
        self.guard.leave()
        self._updating = True
