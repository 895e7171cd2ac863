"""Whether the disk has room for what a run will write, asked before its first step instead of at its first save."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from lumina_ds.checkpoint.format import step_folders
from lumina_ds.config.schema import TrainConfig
from lumina_ds.errors import SharedFault
from lumina_ds.text import format_bytes

logger = logging.getLogger(__name__)

# A line of metrics.jsonl with its CSV row and its line in the log; routing adds some numbers a layer.
METRICS_BYTES = 2048


def check_disk_space(checkpoints: Path, train: TrainConfig, checkpoint_bytes: int, num_steps: int) -> None:
    """Refuse a run whose next checkpoint does not fit, and warn when those to be kept do not; for rank 0.

    `num_steps` are still to be trained. Raises SharedFault.
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
        logger.warning(
            "%s has %s free, and up to %d checkpoints with the metrics take %s more: saves will fail; free some space, "
            "or lower --train.keep_checkpoints",
            *(checkpoints, format_bytes(free), count, format_bytes(needed)),
        )


def checkpoints_at_once(train: TrainConfig, num_steps: int) -> int:
    """The most checkpoints that lie on the disk together: the newest, the best, and the one being written."""
    most = train.keep_checkpoints + 2
    if train.save_every_minutes:
        return most
    saves = 1 + ((num_steps - 1) // train.save_every_n_batches if train.save_every_n_batches else 0)
    return min(saves, most)
