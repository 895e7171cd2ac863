"""A training run on one rank: build, resume, step, evaluate, save, end.

Everything that several ranks must do together happens in the same order on each; what only rank 0 does
(files, console) stands behind `self.leads`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from lumina_ds.checkpoint.saver import CheckpointSaver, SaveOutcome
from lumina_ds.checkpoint.state import load_checkpoint, random_state, set_random_state
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import MicroBatch, PackedRows, TrainingOrder
from lumina_ds.data.prefetch import Prefetcher
from lumina_ds.engine.build import build_engine, set_learning_rate
from lumina_ds.engine.deepspeed.gradient_norm import NormGate
from lumina_ds.engine.schedules import learning_rate
from lumina_ds.engine.world import World
from lumina_ds.errors import ConfigError, Interrupted, LuminaError, UnstableError
from lumina_ds.model.device import device_and_precision
from lumina_ds.monitor.console import TrainingConsole
from lumina_ds.monitor.records import EvaluationRecord, StepRecord
from lumina_ds.monitor.trackers import open_trackers
from lumina_ds.monitor.writers import MetricsWriter
from lumina_ds.plan.duration import checkpoint_bytes
from lumina_ds.train.environment import write_environment
from lumina_ds.train.evaluate import evaluate
from lumina_ds.train.health import StepHealth, Verdict
from lumina_ds.train.long_steps import LongStepStop
from lumina_ds.train.record import step_facts
from lumina_ds.train.resume import changed_settings, checkpoint_to_resume, layout_changes, run_identity
from lumina_ds.train.rollback import go_back
from lumina_ds.train.run_folder import RunFolder, effective_config
from lumina_ds.train.step import StepCounts, StepOutcome, agree, any_rank, rank_micro_batches, run_step
from lumina_ds.train.stop import StopRequest, resumable_message
from lumina_ds.train.watch.watchdog import LOADER, Watchdog

log = logging.getLogger(__name__)

# In longer steps the ranks ask one another between micro-batches whether to stop: a save must begin in time.
SLOW_STEP_SECONDS = 5.0


@dataclass
class Progress:
    """What a resumed run goes on from: steps done, tokens seen, steps skipped, times gone back."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    rollbacks: int = 0


class StopBetweenBatches(Exception):
    """Leaves a step or an evaluation on all ranks together, because a stop was asked for."""


class TrainingRun:
    """One run from its configuration to its last checkpoint."""

    def __init__(self, config: RunConfig, rows: PackedRows, eval_rows: PackedRows | None, world: World) -> None:
        self.config = config
        self.rows = rows
        self.eval_rows = eval_rows
        self.world = world
        self.leads = world.rank == 0
        self.folder = RunFolder.of(config)
        self.published_step: int | None = None
        self.saved_at = time.monotonic()
        self.save_error: LuminaError | None = None
        self.failure: Exception | None = None
        self.step_is_slow = True
        self.updating = False
        self.long_step_stop: LongStepStop | None = None
        _, self.precision, self.precision_reason = device_and_precision(config.train.precision, config.model)
        self.deepspeed_json = compose_deepspeed(config, world.size, self.precision)
        self.batch_rows = config.train.micro_batch_size * config.train.gradient_accumulation_steps * world.share.size
        self.num_steps, self.total_rows = planned_length(config, rows.num_rows, self.batch_rows)
        self.order = TrainingOrder(rows.num_rows, config.train.seed, self.total_rows)
        self.progress = Progress()
        self.health = StepHealth(config.health)
        stage = self.deepspeed_json["zero_optimization"]["stage"]
        strategy = f"ZeRO-{stage} EP{config.deepspeed.expert_parallel_size} {self.precision}"
        self.last_step = self.planned_last_step()
        self.console = TrainingConsole(self.num_steps, self.last_step, strategy, world.size)

    def run(self) -> Progress:
        """Train to the end, to train.stop_at_step, or to a signal; returns where it ended.

        Raises Interrupted after a signal's checkpoint, UnstableError when too many steps are skipped in a row,
        and the typed errors of resuming.
        """
        self.stop = StopRequest()
        try:
            resume_from = self._open_folder()
            with (
                Watchdog(self.folder.logs, self.world, self.config.health, self._on_beat) as self.watchdog,
                ExitStack() as self.outputs,
            ):
                self.engine = build_engine(
                    self.config, self.world, self.precision, self.deepspeed_json, fresh=resume_from is None
                )
                self.saver = self._checkpoint_saver()
                self.outputs.callback(self._close_saver)
                if resume_from is not None:
                    self._restore(resume_from)
                self._open_outputs(resume_from)
                self.long_step_stop = LongStepStop(self, self.watchdog.life)
                self.outputs.callback(self.long_step_stop.close)
                with Prefetcher(self._micro_batches, self.last_step) as batches:
                    self._train(batches)
        finally:
            self.stop.restore()
            self.console.stop()
            self.folder.release()
        return self.progress

    def _on_beat(self) -> None:
        """In the watchdog's thread, once a second."""
        self.stop.notice()
        if self.long_step_stop is not None:
            self.long_step_stop.beat()

    def _open_folder(self) -> Path | None:
        """Take the run folder, find the checkpoint to resume from, and write the configuration."""
        resume_from = checkpoint_to_resume(self)
        if self.leads:
            self.folder.write_settings(self._effective_config(), self.deepspeed_json, self.rows.folder.tokenizer_path)
        write_environment(self.folder.path, self.world, self.num_steps)
        dist.barrier()
        return resume_from

    def _checkpoint_saver(self) -> CheckpointSaver:
        train = self.config.train
        num_bytes = checkpoint_bytes(self.config, self.precision).total
        return CheckpointSaver(
            self.folder.checkpoints,
            self.rows.folder.tokenizer_path,
            self.world,
            train.keep_checkpoints,
            num_bytes,
            train.save_in_background,
        )

    def _restore(self, folder: Path) -> None:
        """Go on from a verified checkpoint, in a fresh engine or in one that has trained. A collective."""
        manifest = load_checkpoint(self.engine, folder)
        self.take(manifest)
        if self.leads:
            for change in changed_settings(manifest, self.config):
                self.console.say(f"changed since the checkpoint: {change}")
            for change in layout_changes(manifest, run_identity(self)):
                self.console.say(f"the state is divided anew: {change}")

    def _effective_config(self) -> dict[str, Any]:
        return effective_config(self.config, self.rows, self.eval_rows)

    def _train(self, batches_ahead: Prefetcher[list[MicroBatch]]) -> None:
        train = self.config.train
        if self.progress.step == 0:
            self._evaluate()
        elif self.progress.step >= self.last_step and self.leads:
            self.console.say("nothing is left to train; raise --max-steps or --epochs to go on")
        norm_gate = None
        if self.health.judges_before_the_update:
            norm_gate = NormGate(self.engine, lambda norm: self.health.refuses_norm(norm))
        elif self.config.health.spike_policy == "rollback" and self.published_step != self.progress.step:
            self._save(None)
        while self.progress.step < self.last_step:
            started = time.perf_counter()
            self.watchdog.enter(LOADER, self.progress.step + 1)
            batches, failure = self._take(batches_ahead)
            data_seconds = time.perf_counter() - started
            self.watchdog.enter("the training step", self.progress.step + 1)
            counts = agree(
                *(batches, self.stop.requested, self.world),
                save_due=self._minutes_are_over(),
                failed=failure is not None,
                slow=self.step_is_slow,
            )
            if counts.stop_requested or counts.failed:
                self._save_and_stop(failure, counts.failed)
            if counts.save_due and self.published_step != self.progress.step:
                self._save(None)
            rate = learning_rate(self.progress.step, self.num_steps, train)
            set_learning_rate(self.engine, rate, train.muon_rate_factor)
            outcome = self._step(batches, counts, self.health if norm_gate else None)
            if norm_gate and (refused := norm_gate.take_refused()) is not None:
                outcome = replace(outcome, grad_norm=refused)
            self.progress.step += 1
            self.progress.tokens += counts.tokens
            self.progress.skipped += outcome.skipped
            verdict = self.health.observe(self.progress.step, outcome.loss, outcome.grad_norm, outcome.skipped)
            seconds = time.perf_counter() - started
            self.step_is_slow = seconds > SLOW_STEP_SECONDS
            self._alone(self._record, outcome, counts, seconds, data_seconds, verdict.anomaly_score)
            if not self._goes_on_after(verdict):
                continue
            self._evaluate_and_save(outcome)
            self._report_save(self.saver.poll())
        self._finish_saving()
        if self.failure is not None:
            raise self.failure
        if self.leads:
            going_on = (
                ""
                if self.progress.step >= self.planned_last_step(None)
                else "; start again without --stop-at-step to go on"
            )
            self.console.say(f"ended at step {self.progress.step} of {self.num_steps}{going_on}")

    def _step(self, batches: list[MicroBatch], counts: StepCounts, gate: StepHealth | None) -> StepOutcome:
        """The optimizer step. Where it is left before its update, the state before it is saved and the run ends."""
        before = random_state()
        try:
            with self._state_stays(before):
                outcome = run_step(
                    *(self.engine, batches, counts, self.config.model, self.config.train.max_grad_norm),
                    *(self.world, gate),
                    between_batches=self._leave_if_stopped if counts.slow else lambda: None,
                    before_update=self._begin_update,
                )
            self.updating = False
            return outcome
        except StopBetweenBatches:
            set_random_state(before)
            self._save_and_stop(None, False)
        except Exception as error:
            # Of several ranks the others are inside a collective, where nothing reaches them.
            if self.world.size > 1 or self.updating:
                raise
            set_random_state(before)
            self._save_and_stop(error, True)

    def _state_stays(self, random: dict[str, Any]) -> AbstractContextManager[None]:
        assert self.long_step_stop is not None
        return self.long_step_stop.guard.unchanged(self.progress.step, random)

    def _begin_update(self) -> None:
        assert self.long_step_stop is not None
        self.long_step_stop.guard.leave()
        self.updating = True

    def _leave_if_stopped(self) -> None:
        if any_rank(self.stop.requested, self.world):
            raise StopBetweenBatches

    def _alone(self, action: Callable[..., None], *args: Any) -> None:
        """Do what concerns this rank alone; what fails in it ends the run where all ranks agree before a step."""
        try:
            action(*args)
        except Exception as error:
            self.failure = self.failure or error

    def take(self, manifest: dict[str, Any]) -> None:
        """Go on from what a checkpoint's manifest says; those of older versions say nothing about health."""
        state = manifest.get("health", {})
        self.progress = Progress(manifest["step"], manifest["tokens"], manifest["skipped"], state.get("rollbacks", 0))
        self.published_step = self.progress.step
        self.health = StepHealth(self.config.health, state)
        self.order.passed_over = tuple((first, count) for first, count in state.get("passed_over", ()))
        self.last_step = self.planned_last_step()

    def planned_last_step(self, stop_at: int | None = 0) -> int:
        """Where this process ends; with None, where the whole run does: rows passed over make epochs shorter."""
        positions = self.order.num_positions
        end = self.num_steps if positions is None else math.ceil(positions / self.batch_rows)
        stop_at = self.config.train.stop_at_step if stop_at == 0 else stop_at
        return min(end, stop_at or end)

    def _goes_on_after(self, verdict: Verdict) -> bool:
        """Say what a step's verdict is; False when the run has gone back because of it. UnstableError at an end."""
        if verdict.ends_run:
            raise UnstableError(verdict.message)
        if verdict.message and self.leads:
            log.warning("%s", verdict.message)
        if not verdict.bad_steps:
            return True
        go_back(self, verdict)
        return False

    def _open_outputs(self, resumed_from: Path | None) -> None:
        if not self.leads:
            return
        trackers = open_trackers(self.config.run, self.folder.path, self._effective_config(), self.progress.step)
        self.metrics = MetricsWriter(self.folder.path, self.progress.step, trackers)
        self.outputs.callback(self.metrics.close)
        self.console.say(
            f"{self.config.run_name}: {self.num_steps} steps of {self.batch_rows} rows x {self.config.seq_length} "
            f"tokens, {self.console.strategy} ({self.precision_reason}), {self.world.size} "
            f"rank{'s' if self.world.size > 1 else ''} on {self.world.device}"
        )
        losses = self.rows.describe_losses()
        if losses:
            self.console.say(losses)
        if resumed_from is not None:
            self.console.say(f"resumed from {resumed_from}")
        self.console.start(self.progress.step)

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of a step. Runs ahead of the loop in a thread of its own."""
        return rank_micro_batches(self.config, self.rows, self.order, step, self.world)

    def _evaluate_and_save(self, outcome: StepOutcome) -> None:
        train, step = self.config.train, self.progress.step
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
        due = train.save_every_n_batches and step % train.save_every_n_batches == 0
        if sound and (ends or due):
            self._save(eval_loss)

    def _evaluate(self, to_its_end: bool = False) -> float | None:
        """The loss on the evaluation rows; None without any, or when a stop was asked for meanwhile."""
        if self.eval_rows is None:
            return None
        train = self.config.train

        def on_batch() -> None:
            self.watchdog.enter("evaluation", self.progress.step)
            if not to_its_end:
                self._leave_if_stopped()

        try:
            with self._state_stays(random_state()):
                result = evaluate(
                    self.engine, self.eval_rows, train.micro_batch_size, self.world, train.eval_max_rows, on_batch
                )
        except StopBetweenBatches:
            return None
        if self.leads:
            counted = int(result["trained_tokens"])
            self.metrics.write_evaluation(
                EvaluationRecord(self.progress.step, result["loss"], result["perplexity"], counted)
            )
            self.console.say(
                f"evaluation at step {self.progress.step}: loss {result['loss']:.4f}, PPL {result['perplexity']:.2f}"
            )
        return result["loss"]

    def _save(self, eval_loss: float | None) -> None:
        self.watchdog.enter("saving a checkpoint", self.progress.step)
        self.settle_saves()
        self.saver.save(self.engine, self.manifest(eval_loss))
        self.published_step, self.saved_at = self.progress.step, time.monotonic()

    def manifest(self, eval_loss: float | None) -> dict[str, Any]:
        """What a checkpoint of the present state says of the run."""
        return run_identity(self) | {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "skipped": self.progress.skipped,
            "rows": self.progress.step * self.batch_rows,
            "eval_loss": eval_loss if eval_loss is None or math.isfinite(eval_loss) else None,
            "config": self._effective_config(),
            "health": self.health.state()
            | {"rollbacks": self.progress.rollbacks, "passed_over": [list(each) for each in self.order.passed_over]},
        }

    def _take(self, batches_ahead: Prefetcher[list[MicroBatch]]) -> tuple[list[MicroBatch], Exception | None]:
        """This rank's micro-batches, or what has failed on it: the others must learn it before they wait for it."""
        try:
            return batches_ahead.take(self.progress.step), self.failure
        except Exception as error:
            return [], self.failure or error

    def _minutes_are_over(self) -> bool:
        minutes = self.config.train.save_every_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def _save_and_stop(self, failure: Exception | None, failed: bool) -> NoReturn:
        """Save the state before the coming step, and raise what ends the run on this rank. A collective."""
        step = self.progress.step
        try:
            if step and self.published_step != step:
                self._save(None)
            self._finish_saving()
        finally:
            if failure is not None:
                raise failure
        if failed:
            raise LuminaError(f"another rank failed (see its line); stopped at step {step}, which is saved")
        raise Interrupted(resumable_message(step, self.num_steps))

    def _close_saver(self) -> None:
        """On every way out: wait for the save under way, so that no thread writes on, and give its group back."""
        self.watchdog.enter("saving a checkpoint", self.progress.step)
        self.settle_saves()
        self.saver.close()

    def settle_saves(self) -> None:
        """Wait for the save under way and say how it ended."""
        self._report_save(self.saver.finish())

    def _finish_saving(self) -> None:
        """Wait for the save under way; raises why the newest step could not be saved."""
        self.settle_saves()
        if self.save_error is not None:
            raise self.save_error

    def _report_save(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        self.save_error = outcome.error
        if not self.leads:
            return
        if outcome.error is None:
            seconds = f"{outcome.total_seconds:.1f} s, of which training waited {outcome.stalled_seconds:.2f} s"
            self.console.say(f"saved {outcome.folder} in {seconds}")
        else:
            log.error("step %d is not saved, earlier checkpoints stay: %s", outcome.step, outcome.error)

    def _record(
        self, outcome: StepOutcome, counts: StepCounts, seconds: float, data_seconds: float, anomaly_score: float
    ) -> None:
        if not self.leads or self.progress.step % self.config.train.log_every_n_batches:
            return
        facts = step_facts(
            *(self.config, self.world, self.order, self.batch_rows, self.num_steps),
            step=self.progress.step,
            tokens=self.progress.tokens,
            skipped=self.progress.skipped,
            outcome=outcome,
            counts=counts,
            seconds=seconds,
            data_seconds=data_seconds,
            anomaly_score=anomaly_score,
            machine=self.watchdog.metrics,
        )
        record = StepRecord.of(facts)
        self.metrics.write(record)
        self.console.show(record)


def planned_length(config: RunConfig, num_rows: int, batch_rows: int) -> tuple[int, int | None]:
    """(steps of the whole run, rows after which only empty filler follows).

    With epochs, the last batch is filled up with empty rows, so that every row is seen exactly `epochs` times.
    """
    train = config.train
    if train.max_steps is not None:
        return train.max_steps, None
    total_rows = round(train.epochs * num_rows)
    if total_rows == 0:
        raise ConfigError(f"train.epochs {train.epochs} of {num_rows} rows is no row at all; raise --epochs")
    return math.ceil(total_rows / batch_rows), total_rows
