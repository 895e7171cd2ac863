"""The whole weights, for inference: safetensors files under Hugging Face's names.

They are gathered from a live engine by collectives between its ranks, or read from the pieces that all ranks have
written: while a checkpoint is saved, or of a finished one without any rank (`lumina checkpoint consolidate`). What comes
from pieces passes through memory a few MiB at a time.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.checkpoint.format import BIASES_FILE
from lumina_ds.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from lumina_ds.checkpoint.pieces import WEIGHT
from lumina_ds.checkpoint.saved_state import SavedState
from lumina_ds.checkpoint.tensor_file import CheckpointFile
from lumina_ds.errors import CheckpointError, ConfigError, MachineError
from lumina_ds.files import WEIGHTS_INDEX, replace_folder, sync_folder, weights_index
from lumina_ds.foreign_files import shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MAX_WEIGHT_FILE_BYTES = 4 << 30


def consolidate(folder: Path, out: Path, dtype: torch.dtype) -> int:
    """Whole weights of a verified step folder as safetensors from its fp32 state; returns their bytes.

    `out` is one file when its name ends in .safetensors, otherwise a folder of files of at most 4 GiB with Hugging
    Face's index; an earlier result there is replaced as a whole, once the new one is complete. Router biases of a
    checkpoint come along. Raises MachineError when it cannot be written, and ConfigError when it is a checkpoint or holds
    other files.
    """
    single = out.suffix == ".safetensors"
    _check_replaceable(out, single)
    manifest = read_manifest(folder)
    saved = SavedState(folder, manifest.files)
    if not saved.shapes:
        raise CheckpointError(f"the optimizer files of {folder} hold no parameter; use another checkpoint")
    shapes = saved.shapes | _bias_shapes(folder, manifest)
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    plan = [list(sizes)] if single else weight_file_plan(sizes, 1)
    names = [out.name] if single else [weight_file_name(number) for number in range(len(plan))]
    index = weights_index(
        {each: name for name, those in zip(names, plan, strict=True) for each in those},
        {"total_size": sum(sizes.values())},
    )
    files = [
        _whole_file(folder, saved, name, {each: shapes[each] for each in those}, dtype)
        for name, those in zip(names, plan, strict=True)
    ]
    if not single:
        files.append(CheckpointFile(WEIGHTS_INDEX, content=index.encode()))
    try:
        _write_whole(files, Path(os.path.realpath(out)), single)
    except OSError as error:
        raise MachineError(f"{out} cannot be written: {error.strerror}; free some space, or set --out") from error
    return sum(sizes.values())


def _write_whole(files: list[CheckpointFile], out: Path, single: bool) -> None:
    """Write beside `out`, then take its place: what stood there stays whole until the new result is."""
    staging = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        for file in files:
            file.write(staging)
        if single:
            os.replace(staging / out.name, out)
            sync_folder(out.parent)
        else:
            replace_folder(staging, out, out.with_name(f"{out.name}.replaced"))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(out: Path, single: bool) -> None:
    """ConfigError where `out` is or lies in a checkpoint, or is a folder with anything but an earlier result."""
    target = out.parent if single else out
    if (target / MANIFEST).exists():
        raise ConfigError(f"{target} is a sealed folder, which more files would damage; set --out to another one")
    own = re.compile(rf"model-\d{{5}}\.safetensors|{re.escape(WEIGHTS_INDEX)}|\..*\.tmp")
    others = [] if single or not out.is_dir() else [path.name for path in out.iterdir() if not own.fullmatch(path.name)]
    if others:
        raise ConfigError(
            f"{out} holds {shown(min(others))}, which is no weights, and is replaced as a whole; set --out to a new folder"
        )


def weight_file_plan(sizes: dict[str, int], world_size: int) -> list[list[str]]:
    """Names of the parameters in each weight file: consecutive ones, at most 4 GiB and about a rank's share."""
    limit = min(MAX_WEIGHT_FILE_BYTES, -(-sum(sizes.values()) // world_size))
    files: list[list[str]] = []
    used = limit
    for name, size in sizes.items():
        if not files or (used + size > limit and used > 0):
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def gathered_weight_files(engine: Any) -> Iterator[CheckpointFile]:
    """This rank's weight files from the live parameters; rank 0 adds the index. A collective: exhaust it."""
    import torch.distributed as dist

    plan, place = _plan(engine)
    owner = {parameter: number % dist.get_world_size() for parameter, number in place.items()}
    batch: dict[str, Tensor] = {}
    for parameter, tensor in full_parameters(engine, owner):
        if tensor is not None:
            batch[parameter] = tensor
            if parameter == plan[place[parameter]][-1]:
                yield CheckpointFile(weight_file_name(place[parameter]), batch)
                batch = {}
    yield from _index(engine, place)


def weight_files_from_pieces(engine: Any, folder: Path) -> Iterator[CheckpointFile]:
    """The same files, bit for bit, from the optimizer files of all ranks in `folder`. No collective."""
    import torch
    import torch.distributed as dist

    plan, place = _plan(engine)
    saved = SavedState(folder, [path.name for path in folder.iterdir()])
    dtypes = {name: parameter.dtype for name, parameter in engine.module.named_parameters()}
    for number in range(dist.get_rank(), len(plan), dist.get_world_size()):
        shapes = {name: torch.empty(saved.shapes[name], dtype=dtypes[name], device="meta") for name in plan[number]}
        yield CheckpointFile(weight_file_name(number), shapes, load=whole_from_pieces(saved, shapes))
    yield from _index(engine, place)


def whole_from_pieces(saved: SavedState, tensors: dict[str, Tensor]) -> Callable[[str], Iterator[Tensor]]:
    """What CheckpointFile asks for values: whole parameters in the dtypes of `tensors`, a few MiB at a time."""

    def load(name: str) -> Iterator[Tensor]:
        for values in saved.pieces(name, WEIGHT, 0, tensors[name].numel()):
            yield values.to(tensors[name].dtype)

    return load


def weight_file_name(number: int) -> str:
    """Name of a weight file by its place in the plan."""
    return f"model-{number + 1:05d}.safetensors"


def full_parameters(engine: Any, owner: Mapping[str, int] | None = None) -> Iterator[tuple[str, Tensor | None]]:
    """Every parameter of the model by its name, whole, on the CPU of its owner (rank 0 by default); None elsewhere.

    A collective: every rank must exhaust the iterator. Only one parameter is whole at a time, so memory stays
    bounded. ZeRO-3 partitions are gathered first, then the experts of the expert-parallel group (their order is
    the group's rank order, deepspeed/module_inject/auto_ep_layer.py).
    """
    import torch
    import torch.distributed as dist

    for name, parameter in engine.module.named_parameters():
        with _gathered(parameter), torch.no_grad():
            whole = _all_experts(parameter) if _is_expert(parameter) else parameter.data
            mine = dist.get_rank() == (owner[name] if owner is not None else 0)
            yield name, whole.detach().cpu().clone() if mine else None


def whole_bytes(engine: Any) -> dict[str, int]:
    """Bytes of every parameter with all experts, by name, in the model's order."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    sizes = {}
    for name, parameter in engine.module.named_parameters():
        size = prod(getattr(parameter, "ds_shape", parameter.shape)) * parameter.element_size()
        if _is_expert(parameter):
            size *= dist.get_world_size(groups._get_expert_parallel_group(parameter.group_name))
        sizes[name] = size
    return sizes


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


def _bias_shapes(folder: Path, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    if BIASES_FILE not in manifest.files:
        return {}
    with safe_open(folder / BIASES_FILE, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def _plan(engine: Any) -> tuple[list[list[str]], dict[str, int]]:
    import torch.distributed as dist

    plan = weight_file_plan(whole_bytes(engine), dist.get_world_size())
    return plan, {parameter: number for number, parameters in enumerate(plan) for parameter in parameters}


def _index(engine: Any, place: dict[str, int]) -> Iterator[CheckpointFile]:
    """What rank 0 adds. The routers' state is alike on all ranks; what inference needs of it belongs here too."""
    import torch.distributed as dist

    from lumina_ds.model.balancing import selection_biases

    if dist.get_rank() != 0:
        return
    biases = selection_biases(engine.module)
    if biases:
        yield CheckpointFile(BIASES_FILE, biases)
    weight_map = {parameter: weight_file_name(number) for parameter, number in place.items()}
    content = weights_index(weight_map | dict.fromkeys(biases, BIASES_FILE), {})
    yield CheckpointFile(WEIGHTS_INDEX, content=content.encode())


def _is_expert(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _gathered(parameter: nn.Parameter) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id"))


def _all_experts(parameter: Any) -> Tensor:
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups

    group = groups._get_expert_parallel_group(parameter.group_name)
    local = parameter.data.contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local, group=group)
    return torch.cat(parts)
