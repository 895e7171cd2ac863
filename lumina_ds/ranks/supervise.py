"""Ranks that are started again: after a failure from the newest checkpoint, after running out of memory with less.

What will not change by itself is not tried again: faults of configuration, data, environment and checkpoints,
a run that diverged, and a stop that was asked for.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from lumina_ds.checkpoint.format import step_folders
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    MachineError,
    OutOfMemory,
    StalledError,
    UnstableError,
)
from lumina_ds.logs import tell
from lumina_ds.monitor.reading import last_step
from lumina_ds.monitor.writers import append_record
from lumina_ds.plan.batch import next_smaller, with_batch
from lumina_ds.ranks.elastic import Fleet
from lumina_ds.ranks.handoff import hand_over
from lumina_ds.ranks.killed import meaning
from lumina_ds.ranks.runner import (
    Ended,
    Signals,
    complete_runner_arguments,
    marked_processes,
    rank_environment,
    run_until_done,
    runner_command,
    say_cards,
    shown_command,
    wait_for_ranks,
)
from lumina_ds.train.run_folder import RunFolder
from lumina_ds.train.watch.heartbeat import Beat, beat_path, cause_of_end, read_beats, tells_of_another_end
from lumina_ds.train.watch.orphans import start_variables

FINAL = {0} | {
    error.exit_code for error in (ConfigError, DataError, MachineError, CheckpointError, UnstableError, Interrupted)
}
MAX_BACKOFF_SECONDS = 300


@dataclass(frozen=True)
class Failure:
    """How far a start got: the newest checkpoint and the last step that any rank or the metrics tell of. `num_ranks` is
    that of an elastic run, else 0."""

    code: int
    reason: str
    checkpoint: str | None
    step: int
    num_ranks: int = 0

    def got_as_far_as(self, other: Failure) -> bool:
        """Other ranks may get further from the same place."""
        return (self.checkpoint, self.step, self.num_ranks) == (other.checkpoint, other.step, other.num_ranks)


def ready_to_start(config: RunConfig, runner: list[str], typed: Sequence[str]) -> Callable[[], int]:
    """What supervises a run whose data are there, once everything is settled that can be refused before a rank starts.

    `runner` are the user's arguments of the deepspeed runner, `typed` is the command for the run folder.
    """
    environment, fleet = rank_environment(), Fleet.of(config, runner)
    if fleet is None:
        say_cards(runner)
    else:
        environment = fleet.environment(environment)

    def make_command(changed: RunConfig) -> list[str]:
        arguments = complete_runner_arguments(runner) if fleet is None else fleet.runner_arguments()
        return runner_command(arguments, hand_over(changed, typed))

    return lambda: supervise(config, make_command, environment, fleet)


def supervise(
    config: RunConfig,
    make_command: Callable[[RunConfig], list[str]],
    environment: dict[str, str],
    fleet: Fleet | None = None,
) -> int:
    """Start the ranks, and again as the configuration says; the exit code of the last start.

    `make_command` gives the deepspeed command for ranks with a configuration, each time with a fresh port. `fleet`
    chooses the ranks of an elastic run before that.
    """
    folder = RunFolder.of(config)
    at_first = _newest(folder)
    batch, restarts, before, failure = _Batch(config), 0, None, None
    with Signals() as signals:
        while True:
            try:
                start = _of_start(config, batch, _newest(folder) != at_first)
                if fleet is not None and not fleet.settle(start, signals):
                    return Interrupted.exit_code
                command = make_command(start)
            except MachineError as error:
                # Such as a full disk: what ended the ranks before is what the caller must learn.
                if failure is None:
                    raise
                tell(f"not started again: {error}")
                return failure.code
            ended = _start(command, environment, signals, fleet)
            failure = _failure(folder, ended, 0 if fleet is None else fleet.num_ranks)
            if failure.code == 0 or ended.signalled:
                return failure.code
            if fleet is not None and fleet.ended_to_change(failure.code):
                continue
            if failure.code == OutOfMemory.exit_code and batch.halve():
                tell(f"out of memory; starting again with {batch}, the same rows per step")
                continue
            if restarts >= config.run.max_restarts or _is_final(failure, fleet):
                return failure.code
            if before is not None and before.got_as_far_as(failure):
                tell(
                    f"no progress: the run failed twice at step {failure.step} from the same checkpoint "
                    f"({failure.checkpoint or 'none'}); not started again"
                )
                return failure.code
            before, restarts = failure, restarts + 1
            if not _wait(folder, failure, restarts, config, signals):
                return Interrupted.exit_code


def _is_final(failure: Failure, fleet: Fleet | None) -> bool:
    return failure.code in FINAL and (fleet is None or not fleet.may_go_on(failure.code))


def _of_start(config: RunConfig, batch: _Batch, has_own_checkpoint: bool) -> RunConfig:
    """The configuration of the next start. `has_own_checkpoint`: this run has saved since it was first started,
    whatever --resume named then."""
    changed = config.model_copy(deep=True)
    if has_own_checkpoint:
        changed.run.resume = "auto"
    return with_batch(changed, batch.micro, batch.accumulation) if batch.halved else changed


class _Batch:
    """Micro-batch and accumulation of the next start."""

    def __init__(self, config: RunConfig) -> None:
        self.policy = config.health.out_of_memory
        self.micro = config.train.micro_batch_size
        self.accumulation = config.train.gradient_accumulation_steps
        self.halved = False
        self._automatic = config.train.auto_micro_batch
        self._folder = RunFolder.of(config)

    def __str__(self) -> str:
        return f"--batch-size {self.micro} --grad-accum {self.accumulation}"

    def halve(self) -> bool:
        """Half the micro-batch and twice the accumulation, or the next divisor; False when that cannot be."""
        if self.policy != "halve":
            return False
        if self._automatic and not self.halved:
            # What the ranks chose; one row, which cannot be halved, when they came to none.
            self.micro, self.accumulation = self._folder.written_batch() or (1, 1)
        if self.micro == 1:
            return False
        micro = next_smaller(self.micro)
        self.micro, self.accumulation, self.halved = micro, self.accumulation * (self.micro // micro), True
        return True


def _start(command: list[str], environment: dict[str, str], signals: Signals, fleet: Fleet | None) -> Ended:
    """One start of the ranks, until none of its processes is left."""
    tell(f"+ {shown_command(command, environment)}")
    mark = uuid.uuid4().hex
    started = time.time()
    try:
        with contextlib.nullcontext() if fleet is None else fleet.watching():
            ended = run_until_done(command, {**environment, **start_variables(mark)}, signals, started)
        if wait_for_ranks(mark):
            # Their launcher was ended alone: the code is its own, and the ranks have written theirs.
            return replace(ended, without_ranks=True)
        if ended.without_ranks:
            tell("stopped by a signal before there was anything to save")
        return ended
    finally:
        end_marked(mark)


def end_marked(mark: str) -> int:
    """End what a start has left on this host, such as ranks whose launcher was killed; how many that were."""
    _, alive = psutil.wait_procs(marked_processes(mark), timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    return len(alive)


def _failure(folder: RunFolder, ended: Ended, num_ranks: int) -> Failure:
    """The cause of an end, from what the ranks wrote last: the runner reports whichever rank it saw end first."""
    beats = [beat for beat in read_beats(folder.logs) if _written_since(folder.logs, beat, ended.started)]
    is_told = ended.code in (0, Interrupted.exit_code) and not ended.without_ranks
    cause = None if is_told else cause_of_end(beats)
    step = max([beat.step for beat in beats] + [last_step(folder.path / "metrics.jsonl")])
    code, reason = ended.code, f"the ranks ended with {ended.code}"
    if cause is not None and cause.end_code is not None:
        if not tells_of_another_end(cause.end_reason):
            code = cause.end_code
        # A stall's line tells of all ranks already.
        reason = cause.end_reason if code == StalledError.exit_code else f"rank {cause.rank}: {cause.end_reason}"
    elif cause is not None and not ended.signalled:
        reason = f"rank {cause.rank} was killed around step {step}"
        tell(f"error: {reason} ({_because(ended)}); its log is {folder.logs}/rank-{cause.rank}.log")
    elif cause is None and not ended.signalled and meaning(code):
        tell(f"error: a rank or its launcher was killed before it trained ({_because(ended)})")
    return Failure(code, reason, _newest(folder), step, num_ranks)


def _because(ended: Ended) -> str:
    return "; ".join([f"exit code {ended.code}{meaning(ended.code)}", *ended.memory])


def _written_since(logs: Path, beat: Beat, started: float) -> bool:
    try:
        return beat_path(logs, beat.rank).stat().st_mtime >= started - 1
    except OSError:
        return False


def _wait(folder: RunFolder, failure: Failure, restart: int, config: RunConfig, signals: Signals) -> bool:
    """Record and announce a restart, and wait its time; False when a signal came meanwhile."""
    seconds = min(config.run.restart_backoff_seconds * 2 ** (restart - 1), MAX_BACKOFF_SECONDS)
    record = {"time": time.time(), "restart": restart, "exit_code": failure.code, "reason": failure.reason}
    append_record(folder.logs / "restarts.jsonl", record | {"step": failure.step, "checkpoint": failure.checkpoint})
    tell(
        f"restart {restart} of {config.run.max_restarts} in {seconds:g} s, from {failure.checkpoint or 'the start'}, "
        f"after step {failure.step}: {failure.reason}"
    )
    if signals.wait(seconds):
        tell("stopped by a signal before the restart; start the same command again to go on")
        return False
    return True


def _newest(folder: RunFolder) -> str | None:
    """Name of the newest step folder; whether it is sound is judged when it is resumed from."""
    folders = step_folders(folder.checkpoints)
    return folders[-1].name if folders else None
