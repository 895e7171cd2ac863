"""The training loop of one rank: read, agree, step, judge, evaluate, save; going back, and stopping with a checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, NoReturn

from lumina_ds.checkpoint.manifest import SavedRun
from lumina_ds.checkpoint.state import load_checkpoint, random_state
from lumina_ds.data.loader import MicroBatch, Prefetcher
from lumina_ds.engine.build import set_learning_rate
from lumina_ds.engine.schedules import learning_rate
from lumina_ds.errors import Interrupted, LuminaError, UnstableError
from lumina_ds.monitor.metrics import StepFacts
from lumina_ds.monitor.records import StepRecord
from lumina_ds.train.evaluate import evaluate
from lumina_ds.train.evaluation_sets import evaluate_sets, judged_loss
from lumina_ds.train.guarded_step import GuardedStep, StepFailed, StopBetweenBatches
from lumina_ds.train.health import Verdict
from lumina_ds.train.outputs import Outputs
from lumina_ds.train.rollback import checkpoint_before, pass_over_samples, refuse_to_go_back_again
from lumina_ds.train.run_folder import RunFolder
from lumina_ds.train.saves import Saves
from lumina_ds.train.setting import Setting
from lumina_ds.train.state import RunState
from lumina_ds.train.step import StepCounts, StepOutcome, agree, peak_memory, rank_micro_batches
from lumina_ds.train.stop import ended_message, nothing_left_message, resumable_message
from lumina_ds.train.watch.watchdog import EVALUATION, LOADER, STEP, Watchdog

log = logging.getLogger(__name__)

# In longer steps the ranks ask one another between micro-batches whether to stop: a save must begin in time.
SLOW_STEP_SECONDS = 5.0


class TrainingLoop:
    """Trains `engine` from `state` on. Whatever it is given was opened before and is closed by somebody else."""

    def __init__(
        self,
        setting: Setting,
        state: RunState,
        engine: Any,
        saves: Saves,
        outputs: Outputs,
        watchdog: Watchdog,
        stop_requested: Callable[[], bool],
        folder: RunFolder,
    ) -> None:
        self.setting, self.config, self.world = setting, setting.config, setting.world
        self.state, self.engine, self.saves = state, engine, saves
        self.outputs, self.watchdog, self.folder = outputs, watchdog, folder
        self.stop_requested = stop_requested
        self.steps = GuardedStep(engine, setting.config, setting.world, state, stop_requested)
        self.last_step = setting.last_step(state)
        self.failure: Exception | None = None
        self.step_is_slow = True

    def train(self, batches_ahead: Prefetcher[list[MicroBatch]]) -> None:
        """To the end. Raises Interrupted, UnstableError, or what failed on this rank, with the state before it saved."""
        if self.state.step == 0:
            self._evaluate()
        elif self.state.step >= self.last_step:
            self.outputs.say(nothing_left_message(self.state.step, self.setting.ends_early(self.state)))
        if self.config.health.spike_policy == "rollback":
            self._save_unless_saved()
        while self.state.step < self.last_step:
            self._next_step(batches_ahead)
        self.saves.finish()
        if self.failure is not None:
            raise self.failure
        step, early = self.state.step, self.setting.ends_early(self.state)
        self.outputs.say(ended_message(step, self.setting.length.num_steps, early))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of a step. Runs ahead of the loop in a thread of its own."""
        return rank_micro_batches(self.config, self.setting.rows, self.state.order, step, self.world)

    def save_inside_step(self, step: int, random: dict[str, Any]) -> LuminaError:
        """In the thread of a LongStepStop: save the state after `step`; what the run ends with."""
        error = self.saves.save_inside_step(self.engine, self._saved_run(None), random)
        error = error or Interrupted(resumable_message(step, self.setting.length.num_steps))
        self.watchdog.tell_end(error)
        self.outputs.end_at_once()
        return error

    def _next_step(self, batches_ahead: Prefetcher[list[MicroBatch]]) -> None:
        started, state = time.perf_counter(), self.state
        self.watchdog.enter(LOADER, state.step + 1)
        batches, failure = self._take_batches(batches_ahead)
        data_seconds = time.perf_counter() - started
        self.watchdog.enter(STEP, state.step + 1)
        counts = agree(
            *(batches, self.stop_requested(), self.world),
            save_due=self.saves.minutes_are_over(),
            failed=failure is not None,
            slow=self.step_is_slow,
            num_sources=self.setting.num_sources,
        )
        if counts.stop_requested or counts.failed:
            self._save_and_stop(failure, counts.failed)
        if counts.save_due:
            self._save_unless_saved()
        set_learning_rate(self.engine, self._rate(state.step), self.config.train.muon_rate_factor)
        outcome = self._step(batches, counts)
        verdict = state.advance(counts, outcome)
        seconds = time.perf_counter() - started
        self.step_is_slow = seconds > SLOW_STEP_SECONDS
        try:
            self._record(outcome, counts, seconds, data_seconds, verdict.anomaly_score)
        except Exception as error:
            # It concerns this rank alone: the run ends where all ranks agree before a step.
            self.failure = self.failure or error
        if self._goes_on_after(verdict):
            self._evaluate_and_save(outcome)
            self.saves.poll()

    def _take_batches(self, ahead: Prefetcher[list[MicroBatch]]) -> tuple[list[MicroBatch], Exception | None]:
        """This rank's micro-batches, or what has failed on it: the others must learn it before they wait for it."""
        try:
            return ahead.take(self.state.step), self.failure
        except Exception as error:
            return [], self.failure or error

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.setting.length.num_steps, self.config.train)

    def _step(self, batches: list[MicroBatch], counts: StepCounts) -> StepOutcome:
        """The optimizer step. Where it is left before its update, the state before it is saved and the run ends."""
        try:
            return self.steps.run(batches, counts)
        except StopBetweenBatches:
            failure = None
        except StepFailed as failed:
            failure = failed.error
        self._save_and_stop(failure, failure is not None)

    def _record(
        self, outcome: StepOutcome, counts: StepCounts, seconds: float, data_seconds: float, anomaly_score: float
    ) -> None:
        state, rows_per_step = self.state, self.setting.length.rows_per_step
        if not self.outputs.leads or state.step % self.config.train.log_every_n_batches:
            return
        facts = StepFacts(
            step=state.step,
            time=time.time(),
            epoch=state.epoch(rows_per_step),
            learning_rate=self._rate(state.step - 1),
            tokens=state.tokens,
            skipped=state.skipped,
            seconds=seconds,
            data_seconds=data_seconds,
            anomaly_score=anomaly_score,
            memory_bytes=peak_memory(self.world),
            counts=counts,
            outcome=outcome,
            config=self.config,
            machine=self.watchdog.metrics,
            samples=state.step_rows(rows_per_step) if self.config.run.record_samples else None,
            sources=state.sources(rows_per_step),
        )
        self.outputs.record(StepRecord.of(facts))

    def _goes_on_after(self, verdict: Verdict) -> bool:
        """Say what a step's verdict is; False when the run has gone back because of it. UnstableError at an end."""
        if verdict.ends_run:
            raise UnstableError(verdict.message)
        if verdict.message and self.outputs.leads:
            log.warning("%s", verdict.message)
        if verdict.bad_steps:
            self._go_back(verdict)
        return not verdict.bad_steps

    def _go_back(self, verdict: Verdict) -> None:
        """Restore the checkpoint before the verdict's bad steps and pass over their samples. A collective."""
        step = self.state.step
        refuse_to_go_back_again(verdict, self.state.rollbacks, self.config.health.max_rollbacks)
        first_bad = step - verdict.bad_steps + 1
        self.saves.settle()
        saved = load_checkpoint(self.engine, checkpoint_before(self.folder.checkpoints, first_bad, self.world))
        passed = (max(saved.step + 1, first_bad), step)
        record = self.folder.path / "passed_over.jsonl" if self.outputs.leads else None
        rows, rows_per_step = self.setting.rows, self.setting.length.rows_per_step
        named = pass_over_samples(self.state.order, rows, passed, rows_per_step, record)
        self.state.go_back(saved)
        self.saves.step = saved.step
        self.last_step = self.setting.last_step(self.state)
        self.outputs.go_back(saved.step)
        if self.outputs.leads:
            log.warning("back to step %d after step %d; %s", saved.step, step, named)

    def _evaluate_and_save(self, outcome: StepOutcome) -> None:
        train, step = self.config.train, self.state.step
        ends = step == self.last_step
        eval_loss = None
        if ends or (train.eval_every_n_batches and step % train.eval_every_n_batches == 0):
            eval_loss = self._evaluate(to_its_end=ends)
        sound = math.isfinite(outcome.loss) and (eval_loss is None or math.isfinite(eval_loss))
        if ends and not sound:
            raise UnstableError(
                f"the loss is not finite at the last step, {step}, so nothing is saved there; "
                "lower --learning-rate, or use --precision fp32"
            )
        if sound and (ends or self.saves.is_due(step)):
            self.saves.save(self.engine, self._saved_run(eval_loss))

    def _evaluate(self, to_its_end: bool = False) -> float | None:
        """The loss by which checkpoints are judged; None without a set, or when a stop was asked for meanwhile."""
        if not self.setting.eval_sets:
            return None
        train, step = self.config.train, self.state.step

        def on_batch() -> None:
            self.watchdog.enter(EVALUATION, step)
            if not to_its_end:
                self.steps.leave_if_stopped()

        try:
            with self.steps.guard.unchanged(step, random_state()):
                how = (train.micro_batch_size, self.world, train.eval_max_rows, on_batch)
                results = evaluate_sets(self.setting.eval_sets, lambda rows: evaluate(self.engine, rows, *how))
        except StopBetweenBatches:
            return None
        self.outputs.evaluations(step, results)
        return judged_loss(results, train.best_by)

    def _saved_run(self, eval_loss: float | None) -> SavedRun:
        return self.state.saved(*self.setting.of_checkpoints, eval_loss)

    def _save_unless_saved(self) -> None:
        if self.saves.step != self.state.step:
            self.saves.save(self.engine, self._saved_run(None))

    def _save_and_stop(self, failure: Exception | None, failed: bool) -> NoReturn:
        """Save the state before the coming step, and raise what ends the run on this rank. A collective."""
        step = self.state.step
        try:
            if step:
                self._save_unless_saved()
            self.saves.finish()
        finally:
            if failure is not None:
                raise failure
        if failed:
            raise LuminaError(f"another rank failed (see its line); stopped at step {step}, which is saved")
        raise Interrupted(resumable_message(step, self.setting.length.num_steps))
