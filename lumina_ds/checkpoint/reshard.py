"""A checkpoint divided for another number of ranks, without any rank.

The pieces are read a few MiB at a time, so memory does not depend on the checkpoint or its parameters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_ds.checkpoint.format import checkpoint_faults, pointer_target, step_folders
from lumina_ds.checkpoint.manifest import MANIFEST, Topology, read_manifest
from lumina_ds.checkpoint.pieces import optimizer_file_name
from lumina_ds.checkpoint.publish import begin, publish
from lumina_ds.checkpoint.saved_state import PieceRecord, SavedState, pieces_metadata
from lumina_ds.checkpoint.tensor_file import CheckpointFile
from lumina_ds.errors import MachineError

if TYPE_CHECKING:
    from torch import Tensor


def reshard(folder: Path, topology: Topology) -> Path:
    """Divide the pieces of a verified step folder among the ranks of `topology`, in its place.

    Published in two phases like a save: a crash leaves the old checkpoint or the new one. The values are the same.
    """
    manifest = read_manifest(folder)
    saved = SavedState(folder, manifest.files)
    staging = begin(folder.parent, manifest.step)
    files = {}
    try:
        for name, entry in manifest.files.items():
            if not name.startswith("optimizer-"):
                _share(folder / name, staging / name)
                files[name] = entry
        for file in _divided(saved, topology.world_size):
            files[file.name] = file.write(staging)
        divided = manifest.model_copy(update={"topology": topology, "files": dict(sorted(files.items()))})
        latest = pointer_target(folder.parent, "latest")
        newest = latest is None or latest.name <= folder.name or bool(checkpoint_faults(latest))
        return publish(staging, divided, keep=len(step_folders(folder.parent)), newest=newest)
    except OSError as error:
        raise MachineError(f"{staging} cannot be written: {error.strerror}; {folder} stays as it is") from error


def _divided(saved: SavedState, world_size: int) -> Iterator[CheckpointFile]:
    import torch

    for rank in range(world_size):
        tensors, records, places = {}, {}, {}
        for name, shape in saved.shapes.items():
            start, end = (number * prod(shape) // world_size for number in (rank, rank + 1))
            keys = saved.keys_of(name, shape)
            records[name] = PieceRecord(
                shape=list(shape), start=start, numel=end - start, keys=keys, scalars=saved.scalars_of(name)
            )
            for key in keys:
                tensors[f"{name}/{key}"] = torch.empty(end - start, device="meta")
                places[f"{name}/{key}"] = (name, key, start, end - start)

        def load(tensor: str, places: dict[str, tuple[str, str, int, int]] = places) -> Iterator[Tensor]:
            return saved.pieces(*places[tensor])

        yield CheckpointFile(optimizer_file_name(rank), tensors, pieces_metadata(records), load=load)


def _share(source: Path, target: Path) -> None:
    """A second name for a file that does not change, or a copy where the file system has no links."""
    import shutil

    assert source.name != MANIFEST
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as copy:
            os.fsync(copy.fileno())
