"""Saving while training goes on: every rank copies its state, a thread writes it, and rank 0 publishes when all have.

The threads agree through a gloo group of their own, so their messages do not mix with the training's. A save that
fails on any rank is reported on all, its folder is removed, and the checkpoints before it stay as they are.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil

from lumina_ds.checkpoint.consolidate import gathered_weight_files, weight_files_from_pieces
from lumina_ds.checkpoint.manifest import EngineCounters, FileEntry, Manifest, SavedRun, step_name
from lumina_ds.checkpoint.publish import begin, publish
from lumina_ds.checkpoint.state import engine_counters, own_files, random_state
from lumina_ds.checkpoint.tensor_file import CheckpointFile
from lumina_ds.data.templates.find import STORED_TEMPLATE
from lumina_ds.engine.world import World, on_rank_0
from lumina_ds.errors import LuminaError, MachineError, UnstableError
from lumina_ds.text import format_bytes

T = TypeVar("T")

logger = logging.getLogger(__name__)

# The copies may take this share of the memory that is free.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended, alike on every rank but for the seconds: `error` says why nothing was published."""

    step: int
    folder: Path
    error: LuminaError | None
    stalled_seconds: float
    total_seconds: float


class CheckpointSaver:
    """Writes the checkpoints of a run, at most one at a time. All but `poll` are collectives."""

    def __init__(self, checkpoints: Path, tokenizer: Path, world: World, keep: int, num_bytes: int, background: bool):
        """`num_bytes` is what a checkpoint is expected to take, over all ranks."""
        import torch.distributed as dist

        self.checkpoints = checkpoints
        self.tokenizer = tokenizer
        self.world = world
        self.keep = keep
        self.num_bytes = num_bytes
        self.background = background
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        self._thread: threading.Thread | None = None
        self._outcome: SaveOutcome | None = None

    def save(self, engine: Any, run: SavedRun) -> None:
        """Begin to save the state as it is now, after a save still under way; `poll` and `finish` tell its end.

        `run` is what a resumed run must know.
        """
        self._join()
        save = _Save(self, run, engine_counters(engine), time.perf_counter())
        if not save.begin():
            return
        files: Iterable[CheckpointFile] = rank_files(engine)
        if not (self.background and self._copies_fit()):
            save.write(lambda: files)
            return
        copies = [file.copied() for file in files]
        save.stalled_seconds = time.perf_counter() - save.started
        self._thread = threading.Thread(target=save.write_beside_training, args=(copies,), name="checkpoint")
        self._thread.start()

    def save_inside_step(self, engine: Any, run: SavedRun, random: dict[str, Any]) -> None:
        """As `save`, from another thread than the training's, which is inside a step and may not update meanwhile.

        Nothing passes through the training's groups. `random` is the random state of before the step. A collective.
        """
        self._join()
        save = _Save(self, run, engine_counters(engine), time.perf_counter())
        if save.begin():
            save.write(lambda: own_files(engine, random), lambda: weight_files_from_pieces(engine, save.staging))

    def poll(self) -> SaveOutcome | None:
        """How a save ended, told once; None while there is no news."""
        if self._thread is not None and self._thread.is_alive():
            return None
        self._thread = None
        outcome, self._outcome = self._outcome, None
        return outcome

    def finish(self, seconds: float | None = None) -> SaveOutcome | None:
        """Wait for the save under way, at most `seconds`, and say how it ended."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self.poll()

    def close(self) -> None:
        """Give the group back after the last save."""
        import torch.distributed as dist

        dist.destroy_process_group(self._group)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copies_fit(self) -> bool:
        """Whether every machine has the memory for its ranks' copies."""
        import torch
        import torch.distributed as dist

        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or self.world.size)
        needed = self.num_bytes / self.world.size * local_ranks
        fits = torch.tensor([int(needed < MEMORY_SHARE * psutil.virtual_memory().available)])
        dist.all_reduce(fits, op=dist.ReduceOp.MIN, group=self._group)
        if not fits.item():
            logger.info("too little free memory for copies of the state; training waits while it is written")
        return bool(fits.item())


def rank_files(engine: Any) -> Iterator[CheckpointFile]:
    """This rank's files one after the other, tensors as views where that is possible. A collective: exhaust it."""
    yield from own_files(engine, random_state())
    yield from gathered_weight_files(engine)


class _Save:
    """One save from its temporary folder to its publication."""

    def __init__(self, saver: CheckpointSaver, run: SavedRun, engine: EngineCounters, started: float) -> None:
        self.saver = saver
        self.run = run
        self.engine = engine
        self.started = started
        self.stalled_seconds: float | None = None
        self.staging = Path()
        self.written: dict[str, FileEntry] = {}

    def begin(self) -> bool:
        """Make the folder if there is room; otherwise the save has ended already. A collective."""
        try:
            self.staging = self._on_rank_0(self._make_folder)
        except LuminaError as error:
            self._end(error)
            return False
        return True

    def write(self, *parts: Callable[[], Iterable[CheckpointFile]]) -> None:
        """Write this rank's files, learn how the others fared, and publish or clean up. A collective.

        A part begins when all ranks have written the one before.
        """
        entries = self.written
        found: dict[str, FileEntry] = {}
        for part in parts:
            gathered = self._gather(entries, self._write_files(part, entries))
            errors = [error for _, error in gathered if error is not None]
            if errors:
                self._on_rank_0(lambda: shutil.rmtree(self.staging, ignore_errors=True))
                self._end(errors[0])
                return
            found |= dict(item for entries, _ in gathered for item in entries.items())
        try:
            self._on_rank_0(lambda: publish(self.staging, self._manifest(found), self.saver.keep))
        except LuminaError as error:
            self._end(error)
            return
        self._end(None)

    def write_beside_training(self, files: Iterable[CheckpointFile]) -> None:
        """`write` in a thread, where an error must not pass unheard."""
        try:
            self.write(lambda: files)
        except Exception as error:
            logger.exception("saving step %d failed", self.run.step)
            self._end(MachineError(f"the checkpoint of step {self.run.step} was not published: {error}"))

    def _write_files(
        self, part: Callable[[], Iterable[CheckpointFile]], entries: dict[str, FileEntry]
    ) -> LuminaError | None:
        error: LuminaError | None = None
        try:
            # To the end even after an error: the other ranks may wait for this one to gather a parameter.
            for file in part():
                if error is None:
                    error = self._write_file(file, entries)
        except LuminaError as unreadable:
            error = error or unreadable
        return error

    def _gather(self, entries: dict[str, FileEntry], error: LuminaError | None) -> list[Any]:
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.saver.world.size
        dist.all_gather_object(gathered, (entries, error), group=self.saver._group)
        return gathered

    def _write_file(self, file: CheckpointFile, entries: dict[str, FileEntry]) -> LuminaError | None:
        bad = file.first_not_finite()
        if bad is not None:
            return UnstableError(f"{bad} holds values that are not finite; lower --learning-rate, or use fp32")
        try:
            entries[file.name] = file.write(self.staging)
        except OSError as error:
            return MachineError(f"{self.staging / file.name} cannot be written: {error.strerror}; free some space")
        return None

    def _manifest(self, files: dict[str, FileEntry]) -> Manifest:
        own = {"engine": self.engine, "files": dict(sorted(files.items()))}
        return Manifest(**(dict(self.run) | own))

    def _make_folder(self) -> Path:
        if not self.saver.checkpoints.is_dir():
            logger.warning(
                "%s is gone; it is made again for the checkpoint of step %d", self.saver.checkpoints, self.run.step
            )
            self.saver.checkpoints.mkdir(parents=True)
        free = shutil.disk_usage(self.saver.checkpoints).free
        if free < self.saver.num_bytes:
            raise MachineError(
                f"a checkpoint takes {format_bytes(self.saver.num_bytes)} and {self.saver.checkpoints} has "
                f"{format_bytes(free)} free; free some space, or lower --train.keep_checkpoints"
            )
        staging = begin(self.saver.checkpoints, self.run.step)
        template = self.saver.tokenizer.with_name(STORED_TEMPLATE)
        for path in (self.saver.tokenizer, *([template] if template.is_file() else [])):
            file = CheckpointFile(path.name, content=path.read_bytes())
            self.written[file.name] = file.write(staging)
        return staging

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        """on_rank_0 in the saver's group, where a disk that refuses is a MachineError."""

        def act() -> T:
            try:
                return action()
            except OSError as error:
                raise MachineError(
                    f"no checkpoint can be made in {self.saver.checkpoints}: {error.strerror}"
                ) from error

        return on_rank_0(self.saver.world, act, self.saver._group)

    def _end(self, error: LuminaError | None) -> None:
        total = time.perf_counter() - self.started
        stalled = total if self.stalled_seconds is None else self.stalled_seconds
        folder = self.saver.checkpoints / step_name(self.run.step)
        self.saver._outcome = SaveOutcome(self.run.step, folder, error, stalled, total)
