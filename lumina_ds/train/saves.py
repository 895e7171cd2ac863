"""When a run saves, whether the disk has room for it, and how each save ended."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumina_ds.checkpoint.format import step_folders
from lumina_ds.checkpoint.manifest import SavedRun
from lumina_ds.checkpoint.saver import CheckpointSaver, SaveOutcome
from lumina_ds.config.schema import TrainConfig
from lumina_ds.engine.world import World
from lumina_ds.errors import LuminaError, SharedFault
from lumina_ds.plan.duration import num_saves
from lumina_ds.text import counted, format_bytes
from lumina_ds.train.watch.watchdog import SAVING

log = logging.getLogger(__name__)

# A line of metrics.jsonl with its CSV row and its line in the log; routing adds some numbers a layer.
METRICS_BYTES = 2048


class Saves:
    """The saves of a run, one at a time. All but `is_due`, `minutes_are_over` and `poll` are collectives."""

    def __init__(
        self,
        checkpoints: Path,
        tokenizer: Path,
        world: World,
        train: TrainConfig,
        num_bytes: int,
        say: Callable[[str], None],
        enter: Callable[[str, int], None],
    ) -> None:
        """`num_bytes` of a checkpoint are expected; `say` shows a line on rank 0, `enter` tells the watchdog that training
        waits for a save. `step` is the one that is saved or being saved, or was resumed from."""
        self.saver = CheckpointSaver(
            checkpoints, tokenizer, world, train.keep_checkpoints, num_bytes, train.save_in_background
        )
        self.train = train
        self.step: int | None = None
        self.error: LuminaError | None = None
        self._say, self._enter = say, enter
        self._saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether the configuration asks for a save after `step`."""
        return bool(self.train.save_every_n_batches) and step % self.train.save_every_n_batches == 0

    def minutes_are_over(self) -> bool:
        """Whether the last save is long enough ago, by this rank's clock."""
        minutes = self.train.save_every_minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, engine: Any, run: SavedRun) -> None:
        """Begin to save the state, after the save under way has ended."""
        self._enter(SAVING, run.step)
        self.settle()
        self.saver.save(engine, run)
        self.step, self._saved_at = run.step, time.monotonic()

    def save_inside_step(self, engine: Any, run: SavedRun, random: dict[str, Any]) -> LuminaError | None:
        """Save from another thread than the training's, which is inside a step and may not update meanwhile.

        A state without any step, or one that is saved already, is left. Returns why the newest step could not be saved.
        """
        self._enter(SAVING, run.step)
        self.settle()
        if run.step and self.step != run.step:
            self.saver.save_inside_step(engine, run, random)
            self.settle()
        return self.error

    def poll(self) -> None:
        """Tell of a save that has ended meanwhile."""
        self._report(self.saver.poll())

    def settle(self) -> None:
        """Wait for the save under way and say how it ended."""
        self._report(self.saver.finish())

    def finish(self) -> None:
        """Wait for the save under way; raises why the newest step could not be saved."""
        self.settle()
        if self.error is not None:
            raise self.error

    def close(self, step: int) -> None:
        """On every way out, after `step`: no thread writes on, and the saver's group is given back."""
        self._enter(SAVING, step)
        self.settle()
        self.saver.close()

    def _report(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        self.error = outcome.error
        if outcome.error is None:
            seconds = f"{outcome.total_seconds:.1f} s, of which training waited {outcome.stalled_seconds:.2f} s"
            self._say(f"saved {outcome.folder} in {seconds}")
        elif self.saver.world.rank == 0:
            log.error("step %d is not saved, earlier checkpoints stay: %s", outcome.step, outcome.error)


def check_disk_space(checkpoints: Path, train: TrainConfig, checkpoint_bytes: int, num_steps: int) -> None:
    """Refuse a run whose next checkpoint does not fit, and warn when those to be kept do not; for rank 0.

    Asked before the first step instead of at the first save. `num_steps` are still to be trained. Raises SharedFault.
    """
    if num_steps <= 0:
        return
    metrics = METRICS_BYTES * (num_steps // train.log_every_n_batches)
    free = shutil.disk_usage(checkpoints).free
    if free < checkpoint_bytes + metrics:
        raise SharedFault(
            f"{checkpoints} has {format_bytes(free)} free, and one checkpoint with the metrics takes "
            f"{format_bytes(checkpoint_bytes + metrics)}; free some space, or set --runs-dir to another disk"
        )
    count = checkpoints_at_once(train, num_steps)
    needed = max(0, count - len(step_folders(checkpoints))) * checkpoint_bytes + metrics
    if free < needed:
        log.warning(
            "%s has %s free, and up to %s with the metrics take %s more: saves may fail; free some space, "
            "or lower --train.keep_checkpoints",
            *(checkpoints, format_bytes(free), counted(count, "checkpoint"), format_bytes(needed)),
        )


def checkpoints_at_once(train: TrainConfig, num_steps: int) -> int:
    """The most checkpoints that lie on the disk together: the newest, the best, and the one being written."""
    # By minutes, it may be after every step.
    saves = num_steps if train.save_every_minutes else num_saves(train, num_steps, step_seconds=1)
    return min(saves, train.keep_checkpoints + 2)
