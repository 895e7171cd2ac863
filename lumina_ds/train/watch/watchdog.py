"""A thread beside every rank's training: it tells what the rank does, notices a stall, and names a slow rank.

A rank that stays in one phase for too long takes every other with it, since their collectives wait for it. Each
rank's watchdog sees that its own training thread does not move, and dumps the stacks of all threads. The first
one to see it reports for all: which rank is in which call, and which one the others wait for. Then the run
ends with StalledError's code, so that `lumina train --max-restarts` can go on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NoReturn

import psutil

from lumina_ds.config.schema import HealthConfig
from lumina_ds.engine.world import World
from lumina_ds.errors import LuminaError, StalledError
from lumina_ds.train.ending import end_code
from lumina_ds.train.watch.heartbeat import Beat, Heartbeat, read_beats
from lumina_ds.train.watch.hosts import lost_hosts, speaks_for_host
from lumina_ds.train.watch.stacks import (
    STACKS_SIGNAL,
    call_of,
    close_stacks,
    is_waiting,
    open_stacks,
    read_stacks,
    stacks_path,
)

log = logging.getLogger(__name__)

LOADER = "the data loader"
STEP = "the training step"
EVALUATION = "evaluation"
SAVING = "saving a checkpoint"
# Building an engine, or writing a large checkpoint, may take several times as long as any step.
SLOW_PHASES = {"start": 4, SAVING: 4}
_BEAT_SECONDS = 1.0
_SAMPLE_SECONDS = 0.05
_PAUSE_SECONDS = 5.0
_REPORT_SECONDS = 4.0
_MOST_SECONDS_TO_END = 60.0
_MIN_SAMPLES = 50


class Watchdog:
    """`with Watchdog(...) as watchdog: watchdog.enter("phase", step)`. Starting it is a collective."""

    def __init__(
        self, logs: Path, world: World, config: HealthConfig, on_beat: Callable[[], None] = lambda: None
    ) -> None:
        """`on_beat` is called about once a second in the watchdog's thread."""
        self.on_beat = on_beat
        self.logs = logs
        self.world = world
        self.config = config
        self.straggler: dict[str, Any] = {}
        self._heartbeat = Heartbeat(logs, world.rank, _common_life())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str, step: int = 0) -> None:
        """Called by the training thread: what it does from now on."""
        self._heartbeat.enter(phase, step)

    def tell_end(self, error: BaseException | None) -> None:
        """Leave word of how this rank ends, for `lumina train`."""
        self._heartbeat.write(end_code(error), _in_words(error))

    @property
    def life(self) -> str:
        """Common to all ranks of this start of the run."""
        return self._heartbeat.life

    @property
    def metrics(self) -> dict[str, Any]:
        """The machine as it was at the last beat, and, on rank 0, the last comparison of the ranks, if any yet."""
        found = self.straggler
        return self._machine | ({"slowest_rank": found["rank"], "straggler_ratio": found["ratio"]} if found else {})

    def __enter__(self) -> Watchdog:
        if self.world.rank == 0:
            for old in self.logs.glob("stall-*"):
                old.unlink(missing_ok=True)
        self._stacks = open_stacks(self.logs, self.world.rank)
        self._heartbeat.write()
        self._machine = machine_metrics(self.logs)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.tell_end(error)
        close_stacks(self._stacks)

    def _watch(self) -> None:
        working, samples = 0, 0
        window_began = next_beat = last = time.monotonic()
        while not self._stop.wait(_SAMPLE_SECONDS):
            samples += 1
            working += not is_waiting(sys._current_frames().get(self._heartbeat.main_thread))
            now = time.monotonic()
            if now - last > _PAUSE_SECONDS:
                # This whole process stood still, as under `scontrol suspend`: that is no stall of its training.
                self._heartbeat.restart_clock()
            last = now
            if now >= next_beat:
                next_beat = now + _BEAT_SECONDS
                # Neither a full machine nor a lost folder may silence the watchdog.
                with contextlib.suppress(OSError, MemoryError, psutil.Error):
                    self._machine = machine_metrics(self.logs)
                    self._heartbeat.write()
                self.on_beat()
                self._check_stall()
            if now - window_began >= self.config.straggler_window_seconds:
                self._heartbeat.share_working = working / samples if samples >= _MIN_SAMPLES else None
                if self.world.rank == 0:
                    self._compare_ranks()
                working, samples, window_began = 0, 0, now

    def _compare_ranks(self) -> None:
        """Rank 0 reads what the others wrote at the end of their last window; nothing is sent between ranks."""
        shares = {b.rank: b.share_working for b in read_beats(self.logs, self._heartbeat.life)}
        known = {rank: share for rank, share in shares.items() if share is not None}
        self.straggler = find_straggler(known)
        if len(known) == self.world.size and self.straggler.get("ratio", 0) > self.config.straggler_ratio:
            rank, ratio = self.straggler["rank"], self.straggler["ratio"]
            log.warning(
                "rank %d is slow: it works %.0f %% of the time while the others wait for it, %.1f times as long as "
                "the median rank",
                *(rank, 100 * known[rank], ratio),
            )

    def _check_stall(self) -> None:
        limit = self.config.stall_timeout_seconds * SLOW_PHASES.get(self._heartbeat.phase, 1)
        if limit == 0:
            return
        # Should even this thread not get to run, because foreign code holds the interpreter, C code ends the process.
        # It needs a thread, which a process without memory does not get.
        with contextlib.suppress(RuntimeError):
            faulthandler.dump_traceback_later(2 * limit + 60, exit=True, file=self._stacks)
        if self._heartbeat.seconds_in_phase >= limit:
            self._end_stalled_run()

    def _end_stalled_run(self) -> None:
        # A folder that all hosts share may stand still with the network: no word in it may keep the end waiting.
        end = threading.Timer(_MOST_SECONDS_TO_END, os._exit, (StalledError.exit_code,))
        end.daemon = True
        end.start()
        if lost := lost_hosts(self.world):
            self._end_cut_off(lost)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        reports = self._is_first()
        if reports:
            message = self._report()
            self._heartbeat.write(StalledError.exit_code, message)
            log.error("error: %s", message)
            self._end_the_stopped()
        else:
            # The first one ends the run; time for it to read what this rank has just dumped.
            time.sleep(2 * _REPORT_SECONDS)
        os._exit(StalledError.exit_code)

    def _end_cut_off(self, lost: list[str]) -> NoReturn:
        """Every host says for itself whom it has lost."""
        seconds, step = self._heartbeat.seconds_in_phase, self._heartbeat.step
        message = f"no progress for {seconds:.0f} s at step {step}: {'; '.join(lost)}; check the network between them"
        if speaks_for_host(self.world):
            log.error("error: %s", message)
        self._heartbeat.write(StalledError.exit_code, message)
        os._exit(StalledError.exit_code)

    def _is_first(self) -> bool:
        try:
            (self.logs / f"stall-{self._heartbeat.life}").touch(exist_ok=False)
        except OSError:
            return False
        return True

    def _report(self) -> str:
        """Ask the other ranks of this host for their stacks, wait for all, and say who is where."""
        seconds = self._heartbeat.seconds_in_phase
        before = {beat.rank: beat for beat in read_beats(self.logs, self._heartbeat.life)}
        for beat in before.values():
            if beat.rank != self.world.rank and beat.is_here and not beat.is_stopped:
                _send(beat, STACKS_SIGNAL)
        time.sleep(_REPORT_SECONDS)
        self._heartbeat.write()
        beats = read_beats(self.logs, self._heartbeat.life)
        silent = {beat.rank for beat in beats if beat.rank in before and beat.count == before[beat.rank].count}
        for beat in beats:
            if beat.is_stopped:
                _take_stacks_of_stopped(beat, stacks_path(self.logs, beat.rank))
        lines = stall_lines(beats, silent, self.logs)
        return (
            f"no progress for {seconds:.0f} s at step {max(beat.step for beat in beats)}: {'; '.join(lines)}; "
            f"stacks in {self.logs}/stacks-rank-*.txt"
        )

    def _end_the_stopped(self) -> None:
        """A stopped process cannot end by itself, and the deepspeed runner would wait for it half a minute."""
        for beat in read_beats(self.logs, self._heartbeat.life):
            if beat.rank != self.world.rank and beat.is_stopped:
                _send(beat, signal.SIGKILL)


def _send(beat: Beat, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(beat.pid, number)


def _take_stacks_of_stopped(beat: Beat, path: Path) -> None:
    """Let a stopped process go on for the moment that its dump takes, and stop it again."""
    size = path.stat().st_size if path.exists() else 0
    _send(beat, STACKS_SIGNAL)
    _send(beat, signal.SIGCONT)
    _wait_until(lambda: path.exists() and path.stat().st_size > size)
    _send(beat, signal.SIGSTOP)
    _wait_until(lambda: beat.is_stopped)


def _wait_until(holds: Callable[[], bool], seconds: float = 0.5) -> None:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)


def stall_lines(beats: list[Beat], silent: set[int], logs: Path) -> list[str]:
    """`rank 1 is in collate (...) during the data loader`, the ranks that the others wait for first."""
    places: dict[str, list[int]] = {}
    for beat in beats:
        places.setdefault(_place(beat, beat.rank in silent, logs), []).append(beat.rank)
    ordered = sorted(places.items(), key=lambda item: (item[0].startswith("waits in"), item[1]))
    return [_subject(ranks, place) for place, ranks in ordered]


def _place(beat: Beat, silent: bool, logs: Path) -> str:
    during = f"in {beat.phase} of step {beat.step}" if beat.step else f"in {beat.phase}"
    if silent and not beat.is_here:
        return f"is gone, or its host is, since it was {during}"
    call = call_of(read_stacks(stacks_path(logs, beat.rank)), beat.main_thread, beat.phase == LOADER)
    if beat.is_stopped:
        # Its stack is of this moment, its beat of up to a second before.
        return f"was stopped by a signal where it {call}" if call else f"was stopped by a signal, last seen {during}"
    if silent and call is None:
        return f"does not answer {during}"
    return f"{call or 'is'} {during}"


def _subject(ranks: list[int], place: str) -> str:
    """`rank 1 waits in ...`, `ranks 0, 2 wait in ...`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} {place}"
    verb, _, rest = place.partition(" ")
    plural = {"waits": "wait", "is": "are", "was": "were", "does": "do"}[verb]
    return f"ranks {', '.join(map(str, ranks))} {plural} {rest}"


def find_straggler(shares: dict[int, float]) -> dict[str, Any]:
    """The rank that works most while others wait: {"rank", "ratio"} over the median rank; {} below two ranks."""
    if len(shares) < 2:
        return {}
    rank = max(shares, key=lambda each: shares[each])
    others = median(share for each, share in shares.items() if each != rank)
    return {"rank": rank, "ratio": shares[rank] / max(others, 0.01)}


def machine_metrics(folder: Path) -> dict[str, int]:
    """Memory of this process and of its host, and room on the run folder's disk, in bytes."""
    return {
        "host_memory_bytes": psutil.Process().memory_info().rss,
        "host_memory_available_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }


def _in_words(error: BaseException | None) -> str:
    if error is None:
        return ""
    named = str(error) if isinstance(error, LuminaError) else f"{type(error).__name__}: {error}"
    return named.partition("\n")[0][:1000]


def _common_life() -> str:
    import torch.distributed as dist

    life = [uuid.uuid4().hex[:12]]
    if dist.is_initialized():
        dist.broadcast_object_list(life, src=0)
    return life[0]
