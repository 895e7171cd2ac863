"""A checkpoint rewritten without any rank: as whole weights, or divided for another number of ranks.

Both read the pieces of all ranks a few MiB at a time, so memory does not depend on the checkpoint or its parameters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.checkpoint.format import (
    BIASES_FILE,
    MANIFEST,
    WEIGHTS_INDEX,
    checkpoint_faults,
    pointer_target,
    read_manifest,
    step_folders,
)
from lumina_ds.checkpoint.pieces import optimizer_file_name
from lumina_ds.checkpoint.publish import begin, publish
from lumina_ds.checkpoint.state import PIECES, SavedState, piece_record
from lumina_ds.checkpoint.tensor_file import CheckpointFile
from lumina_ds.checkpoint.whole_weights import weight_file_name, weight_file_plan, whole_from_pieces
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.files import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def consolidate(folder: Path, out: Path, dtype: torch.dtype) -> int:
    """Whole weights of a verified step folder as safetensors from its fp32 state; returns their bytes.

    `out` is one file when its name ends in .safetensors, otherwise a folder of files of at most 4 GiB with Hugging
    Face's index. Router biases of a checkpoint come along. Raises MachineError when it cannot be written, and ConfigError when it is a
    checkpoint or another folder with a manifest.
    """
    manifest = read_manifest(folder)
    saved = SavedState(folder, manifest["files"])
    shapes = saved.shapes | _bias_shapes(folder, manifest)
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    single = out.suffix == ".safetensors"
    plan = [list(sizes)] if single else weight_file_plan(sizes, 1)
    names = [out.name] if single else [weight_file_name(number) for number in range(len(plan))]
    target = out.parent if single else out
    if (target / MANIFEST).exists():
        raise ConfigError(f"{target} is a sealed folder, which more files would damage; set --out to another one")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, parameters in zip(names, plan, strict=True):
            _whole_file(folder, saved, f".{name}.tmp", {each: shapes[each] for each in parameters}, dtype).write(target)
            os.replace(target / f".{name}.tmp", target / name)
        if not single:
            weight_map = {each: name for name, parameters in zip(names, plan, strict=True) for each in parameters}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_atomically(out / WEIGHTS_INDEX, json.dumps(index, indent=1))
    except OSError as error:
        for unfinished in target.glob(".*.safetensors.tmp"):
            unfinished.unlink(missing_ok=True)
        raise MachineError(f"{out} cannot be written: {error.strerror}; free some space, or set --out") from error
    return sum(sizes.values())


def reshard(folder: Path, topology: dict[str, Any]) -> Path:
    """Divide the pieces of a verified step folder among topology["world_size"] ranks, in its place.

    Published in two phases like a save: a crash leaves the old checkpoint or the new one. The values are the same.
    """
    manifest = read_manifest(folder)
    saved = SavedState(folder, manifest["files"])
    staging = begin(folder.parent, manifest["step"])
    files = {}
    try:
        for name, entry in manifest["files"].items():
            if not name.startswith("optimizer-"):
                _share(folder / name, staging / name)
                files[name] = entry
        for file in _divided(saved, topology["world_size"]):
            files[file.name] = file.write(staging)
        divided = {key: value for key, value in manifest.items() if key != "digest"} | {
            "topology": manifest["topology"] | topology,
            "files": dict(sorted(files.items())),
        }
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
            records[name] = piece_record(shape, start, end - start, keys, saved.scalars_of(name))
            for key in keys:
                tensors[f"{name}/{key}"] = torch.empty(end - start, device="meta")
                places[f"{name}/{key}"] = (name, key, start, end - start)

        def load(tensor: str, places: dict[str, tuple[str, str, int, int]] = places) -> Iterator[Tensor]:
            return saved.pieces(*places[tensor])

        yield CheckpointFile(optimizer_file_name(rank), tensors, {PIECES: json.dumps(records)}, load=load)


def _whole_file(
    folder: Path, saved: SavedState, name: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> CheckpointFile:
    import torch
    from safetensors import safe_open

    tensors = {parameter: torch.empty(shape, dtype=dtype, device="meta") for parameter, shape in shapes.items()}
    whole = whole_from_pieces(saved, tensors)

    def load(parameter: str) -> Iterator[Tensor]:
        if parameter in saved.shapes:
            yield from whole(parameter)
        else:
            with safe_open(folder / BIASES_FILE, framework="pt") as file:
                yield file.get_tensor(parameter).to(dtype)

    return CheckpointFile(name, tensors, load=load)


def _bias_shapes(folder: Path, manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    if BIASES_FILE not in manifest["files"]:
        return {}
    with safe_open(folder / BIASES_FILE, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def _share(source: Path, target: Path) -> None:
    """A second name for a file that does not change, or a copy where the file system has no links."""
    import shutil

    assert source.name != MANIFEST
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
