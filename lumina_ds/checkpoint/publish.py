"""A finished step folder becomes a checkpoint, and older ones go: what rank 0 does with names, crash by crash.

Written under a temporary name, sealed by its manifest, renamed, pointed at: each moment at which the process may die
leaves a sound checkpoint to be found. Folders are renamed before they are deleted, so none is ever half there.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path

from lumina_ds.checkpoint.format import STEP_NAME, checkpoint_faults, pointer_target, step_folders
from lumina_ds.checkpoint.manifest import MANIFEST, Manifest, read_manifest, step_name
from lumina_ds.errors import CheckpointError
from lumina_ds.files import replace_folder, write_atomically

logger = logging.getLogger(__name__)


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what crashed saves and deletions left is removed."""
    for pattern in ("step-*.tmp", "step-*.deleted"):
        for unfinished in checkpoints.glob(pattern):
            shutil.rmtree(unfinished, ignore_errors=True)
    staging = checkpoints / f"{step_name(step)}.tmp"
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, manifest: Manifest, keep: int, newest: bool = True) -> Path:
    """Seal `staging` with its manifest, give it its name, move the pointers, and delete older checkpoints.

    `latest` moves to a checkpoint that is `newest`, `best` to one with a lower evaluation loss.
    """
    write_atomically(staging / MANIFEST, manifest.sealed())
    final = staging.with_suffix("")
    replace_folder(staging, final, final.with_name(f"{final.name}.replaced"))
    if newest:
        write_atomically(final.parent / "latest", final.name)
    if manifest.eval_loss is not None and manifest.eval_loss < best_loss(final.parent, manifest.eval_set):
        write_atomically(final.parent / "best", final.name)
    prune(final.parent, keep)
    return final


def restore_replaced(checkpoints: Path) -> None:
    """Give a checkpoint its name back where a crash came while it was being replaced by one of the same step."""
    for replaced in checkpoints.glob("step-*.replaced"):
        final = replaced.with_suffix("")
        if STEP_NAME.fullmatch(final.name) and not final.exists():
            os.rename(replaced, final)


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep`, `latest` and `best`, provided that one of those verifies.

    What cannot be deleted stays, under a name that is no checkpoint's.
    """
    folders = step_folders(checkpoints)
    pointed = {pointer_target(checkpoints, "latest"), pointer_target(checkpoints, "best")}
    old = [folder for folder in folders[:-keep] if folder not in pointed]
    kept = [folder for folder in reversed(folders) if folder not in old]
    if not old or not _any_sound(kept):
        return
    for folder in old:
        doomed = folder.with_name(f"{folder.name}.deleted")
        try:
            os.rename(folder, doomed)
        except OSError as error:
            logger.warning("%s cannot be deleted (%s) and stays", folder.name, error.strerror)
            continue
        shutil.rmtree(doomed, ignore_errors=True)
        if doomed.exists():
            logger.warning("%s cannot be deleted as a whole; its rest is %s", folder.name, doomed.name)


def best_loss(checkpoints: Path, eval_set: str | None = None) -> float:
    """Evaluation loss of the checkpoint that `best` names; infinite when there is none that can be read, or its loss is
    on another set than `eval_set`."""
    best = pointer_target(checkpoints, "best")
    try:
        manifest = read_manifest(best) if best is not None else None
    except CheckpointError:
        manifest = None
    if manifest is None or manifest.eval_loss is None or manifest.eval_set != eval_set:
        return math.inf
    return manifest.eval_loss


def _any_sound(folders: list[Path]) -> bool:
    for folder in folders:
        faults = checkpoint_faults(folder)
        if not faults:
            return True
        logger.warning("%s is damaged, so older checkpoints stay: %s", folder.name, faults[0])
    return False
