"""Step folders on disk: what a sound one is, finding the newest, and the pointers `latest` and `best`.

A step folder holds every rank's pieces of parameters and optimizer state, every rank's random state, the whole
weights as safetensors (so that evaluation and generation need no DeepSpeed), the tokenizer, and manifest.json
(checkpoint/manifest.py), which is written last and names every file with size and digest. A folder without a manifest
that verifies is not a checkpoint. checkpoint/saver.py writes them; nothing outside the folder is followed from them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumina_ds.checkpoint.manifest import FileEntry, read_manifest, step_name
from lumina_ds.errors import CheckpointError
from lumina_ds.files import WEIGHTS_INDEX, file_digest, read_weights_index, write_atomically

logger = logging.getLogger(__name__)

BUFFERS_FILE = "buffers.safetensors"
BIASES_FILE = "model-routers.safetensors"
STEP_NAME = re.compile(r"step-\d{8}")
POINTERS = ("latest", "best")
# Hashing lets go of Python's lock, so files are read side by side.
_READERS = 8


def newest_valid(checkpoints: Path) -> Path | None:
    """The newest step folder that verifies, named by `latest` or not; None when there is no step folder at all.

    Each damaged one is reported in a line. Raises CheckpointError when there are some and none is sound: a
    silent fresh start would hide the loss.
    """
    folders = step_folders(checkpoints)
    for folder in reversed(folders):
        faults = checkpoint_faults(folder)
        if not faults:
            return folder
        logger.warning("%s is damaged and is passed over: %s", folder.name, faults[0])
    if folders:
        which = f"none of the {len(folders)} checkpoints" if len(folders) > 1 else "no checkpoint"
        raise CheckpointError(
            f"{which} in {checkpoints} is sound; start anew with --resume none and another --experiment-name"
        )
    return None


def find_checkpoint(path: Path) -> Path:
    """The sound step folder meant by a run folder (its newest) or a step folder; CheckpointError otherwise."""
    if STEP_NAME.fullmatch(path.name):
        faults = checkpoint_faults(path)
        if faults:
            raise CheckpointError(f"{path} cannot be used: {faults[0]}")
        return path
    if not (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path} is neither a run folder nor a checkpoint (step-XXXXXXXX); give one of them")
    found = newest_valid(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint yet; train first")
    return found


def step_folders(checkpoints: Path) -> list[Path]:
    """Published step folders by step, oldest first. A link is none: it may lead out of the run folder."""
    return sorted(path for path in checkpoints.glob("step-*") if STEP_NAME.fullmatch(path.name) and _is_folder(path))


def checkpoint_faults(folder: Path) -> list[str]:
    """What is wrong with a step folder: missing, short or altered files. Reads every byte."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    files = manifest.files
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda name: _file_fault(folder, name, files[name]), files)
        return [fault for fault in found if fault is not None]


def _file_fault(folder: Path, name: str, entry: FileEntry) -> str | None:
    path = folder / name
    if Path(name).name != name or path.is_symlink():
        return f"{name} leads out of the checkpoint"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry.bytes:
        return f"{name} has {path.stat().st_size} bytes instead of {entry.bytes}"
    try:
        altered = file_digest(path) != entry.sha256
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return f"{name} was altered (its digest differs)" if altered else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the whole weights of a step folder; CheckpointError when its index names none."""
    try:
        names = sorted(set(read_weights_index(folder).values()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_INDEX} is no index of weight files: {error}") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder / WEIGHTS_INDEX} names {missing[0]}, which is missing")
    return [folder / name for name in names]


def set_aside_later_steps(checkpoints: Path, step: int) -> None:
    """Rename the steps after `step`, which a run that goes back leaves behind, so that none is resumed from later.

    First `latest` and `best` let go of them: another checkpoint will have their names.
    """
    folders = step_folders(checkpoints)
    staying = [folder for folder in folders if folder.name <= step_name(step)]
    for pointer, target in (("latest", staying[-1] if staying else None), ("best", _best_of(staying))):
        named = pointer_target(checkpoints, pointer)
        if named is None or named in staying:
            continue
        if target is None:
            (checkpoints / pointer).unlink()
        else:
            write_atomically(checkpoints / pointer, target.name)
    for folder in folders:
        if folder not in staying:
            kept = folder.with_name(f"{folder.name}.abandoned")
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(folder, kept)
            logger.warning("%s is of a course that this run leaves; kept as %s", folder.name, kept.name)


def _best_of(folders: list[Path]) -> Path | None:
    """The one with the lowest evaluation loss on the set that the newest was judged by, of those that can be read."""
    losses: dict[str | None, dict[Path, float]] = {}
    newest = None
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(folder)
            if manifest.eval_loss is not None:
                newest = manifest.eval_set
                losses.setdefault(newest, {})[folder] = manifest.eval_loss
    comparable = losses.get(newest, {})
    return min(comparable, key=lambda folder: comparable[folder], default=None)


@dataclass(frozen=True)
class StepSummary:
    """A step folder in a list: `marks` are the pointers that name it, `fault` says why its manifest cannot be read.

    Files are not digested here.
    """

    name: str
    step: int
    num_bytes: int | None = None
    eval_loss: float | None = None
    marks: tuple[str, ...] = ()
    topology: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


def step_summaries(folders: Sequence[Path]) -> list[StepSummary]:
    """What lists show of step folders, in their order."""
    return [_summary(folder) for folder in folders]


def _summary(folder: Path) -> StepSummary:
    step = int(folder.name.removeprefix("step-"))
    marks = tuple(name for name in POINTERS if pointer_target(folder.parent, name) == folder)
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return StepSummary(folder.name, step, marks=marks, fault=str(error))
    topology = manifest.topology.model_dump()
    return StepSummary(folder.name, step, manifest.num_bytes, manifest.eval_loss, marks, topology)


def step_folders_in(path: Path) -> list[Path]:
    """The step folders of a run folder, or `path` itself when it is one; CheckpointError when there is none."""
    folders = [path] if STEP_NAME.fullmatch(path.name) and path.is_dir() else step_folders(path / "checkpoints")
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint; give a run folder or one of its step folders")
    return folders


def pointer_target(checkpoints: Path, pointer: str) -> Path | None:
    """The step folder that the file `latest` or `best` names; None when absent or not a plain step name."""
    path = checkpoints / pointer
    try:
        name = "" if path.is_symlink() else path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    target = checkpoints / name if STEP_NAME.fullmatch(name) else None
    return target if target is not None and _is_folder(target) else None


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
