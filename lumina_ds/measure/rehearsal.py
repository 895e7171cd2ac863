"""Single ranks of a cluster that is not there: DeepSpeed's own set-up, without memory for tensors.

torch's fake process group stands for the other ranks and its FakeTensorMode gives tensors a shape and no storage, so
that the run's own build_engine converts the experts, makes the groups, partitions and writes checkpoints as it would
among any number of ranks. Nothing is computed: forward and backward are not part of it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import LuminaError
from lumina_ds.ranks.ask import MODULE, Question, question_words, read_answer


@dataclass(frozen=True)
class RankRehearsal:
    """What DeepSpeed built as one rank. Bytes are of this rank; `held_elements` are what all ranks together hold,
    without padding. `experts` are the numbers of those it owns, the same in every layer; the two groups are the ranks
    that share a set of experts, and those that hold copies of its own. `files` are the sizes of what it would save."""

    rank: int
    parameter_bytes: int = 0
    master_bytes: int = 0
    moment_bytes: int = 0
    held_elements: int = 0
    padding_elements: int = 0
    experts: list[int] = field(default_factory=list)
    expert_group: list[int] = field(default_factory=list)
    replica_group: list[int] = field(default_factory=list)
    files: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None


def rehearse(
    config: RunConfig, world_size: int, precision: str, deepspeed_json: Mapping[str, Any], ranks: Sequence[int]
) -> list[RankRehearsal]:
    """Each of `ranks` among `world_size`, in a process of its own, several at a time.

    A rank that DeepSpeed refuses comes back with its message as `error`.
    """
    replaced, _ = substituted(deepspeed_json)
    shared = {"world_size": world_size, "precision": precision, "deepspeed_json": replaced}
    width = max(1, min(len(ranks), len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(lambda rank: _in_own_process(config, {**shared, "rank": rank}), ranks))


def substituted(deepspeed_json: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The JSON with what needs a GPU, a compiler or a disk exchanged for what takes the same bytes, and what that was."""
    changed: dict[str, Any] = copy.deepcopy(dict(deepspeed_json))
    notes = []
    if changed.get("fp16", {}).get("enabled"):
        changed["bf16"] = {"enabled": True}
        del changed["fp16"]
        notes.append("fp16 as bf16, which a CPU has")
    # Comparing the tag among the ranks reads values, which fake tensors do not have.
    changed.setdefault("checkpoint", {})["tag_validation"] = "Ignore"
    zero = changed["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        offload = zero.get(section) or {}
        if offload.get("device") == "nvme":
            offload["device"] = "cpu"
            offload.pop("nvme_path", None)
            notes.append(f"{section} to NVMe as host memory")
        if offload:
            offload["pin_memory"] = False
    if zero.get("offload_optimizer"):
        changed["optimizer"]["params"]["torch_adam"] = True
        changed["zero_force_ds_cpu_optimizer"] = False
        notes.append("DeepSpeed's CPU Adam, which is compiled at its first use, as torch's")
    return changed, notes


def _in_own_process(config: RunConfig, arguments: dict[str, Any]) -> RankRehearsal:
    """DeepSpeed keeps its groups in the module, so that one process can be one rank only."""
    question = Question("lumina_ds.measure.rehearsal.rehearse_rank", arguments, config, forms_group=False)
    with tempfile.TemporaryDirectory(prefix="lumina-rehearsal-") as folder:
        words, answered = question_words(question, Path(folder))
        done = subprocess.run([sys.executable, "-m", MODULE, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            return RankRehearsal(arguments["rank"], error=f"the rehearsal ended with {done.returncode}: {last[0]}")
        return RankRehearsal(**read_answer(answered))


def rehearse_rank(
    config: RunConfig, world_size: int, rank: int, precision: str, deepspeed_json: dict[str, Any]
) -> RankRehearsal:
    """Set the run up as one rank, in this process, which can be nothing else afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lumina_ds.engine.deepspeed.fake_tensors import modules_stay_in_place
    from lumina_ds.engine.world import start_rehearsal

    world = start_rehearsal(rank, world_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), modules_stay_in_place():
            engine = _engine(config, world, precision, deepspeed_json)
            _take_one_step(engine.optimizer)
            return _describe(engine, rank, _saved_files(engine, rank))
    except LuminaError:
        raise
    except Exception as error:
        # Whatever DeepSpeed raises is the finding.
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        return RankRehearsal(rank, error=message)


def _engine(config: RunConfig, world: Any, precision: str, deepspeed_json: dict[str, Any]) -> Any:
    """The run's own engine, empty: build_engine with tensors that are made in their type and place."""
    from lumina_ds.engine.build import build_engine

    config = config.model_copy(deep=True)
    config.train.compile = "off"
    config.train.flash_attention, config.train.attention_backend = "off", "auto"
    return build_engine(config, world, "bf16" if precision == "fp16" else precision, deepspeed_json, fresh=False)


def _take_one_step(optimizer: Any) -> None:
    """Let the inner optimizer make its moments."""
    import torch

    inner = getattr(optimizer, "optimizer", optimizer)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            inner.param_groups[optimizer.sub_group_to_group_id[number]]["params"] = [flat]
            flat.grad = torch.zeros_like(flat)
            inner.step()
            flat.grad = None
        # Between steps the small parameters that ZeRO-3 keeps are whole.
        optimizer.checkpoint_event_prologue()
        optimizer.checkpoint_event_epilogue()
        return
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    inner.step()
    for parameter in parameters:
        parameter.grad = None


def _saved_files(engine: Any, rank: int) -> dict[str, int]:
    """Name and size of the values of what this rank would save of parameters and moments."""
    from lumina_ds.checkpoint.pieces import optimizer_file_name, pieces_of_rank

    tensors = [view for piece in pieces_of_rank(engine, divided=True) for view in piece.tensors().values()]
    return {optimizer_file_name(rank): sum(tensor.numel() * tensor.element_size() for tensor in tensors)}


def _describe(engine: Any, rank: int, files: dict[str, int]) -> RankRehearsal:
    from lumina_ds.engine.deepspeed.expert_parallel import expert_groups
    from lumina_ds.measure.live_tensors import master_tensors, moment_tensors, num_bytes, parameter_tensors

    experts = expert_groups(engine.module)
    held, padding = _held_elements(engine, experts.num_sharing)
    return RankRehearsal(
        rank=rank,
        parameter_bytes=num_bytes(parameter_tensors(engine)),
        master_bytes=num_bytes(master_tensors(engine.optimizer)),
        moment_bytes=num_bytes(moment_tensors(engine.optimizer)),
        held_elements=held,
        padding_elements=padding,
        experts=experts.owned,
        expert_group=experts.sharing,
        replica_group=experts.replicas,
        files=files,
    )


def _held_elements(engine: Any, spread: int) -> tuple[int, int]:
    """(elements of all ranks' partitions without padding, padding); experts count once per rank that shares them."""
    optimizer = engine.optimizer
    held = padding = 0
    if hasattr(optimizer, "parallel_partitioned_bit16_groups"):
        for number, partitions in enumerate(optimizer.parallel_partitioned_bit16_groups):
            times = 1 if all(getattr(p, "allreduce", True) for p in optimizer.bit16_groups[number]) else spread
            held += times * (sum(part.numel() for part in partitions) - optimizer.groups_padding[number])
            padding += times * optimizer.groups_padding[number]
        return held, padding
    for parameter in engine.module.parameters():
        times = 1 if getattr(parameter, "allreduce", True) else spread
        if hasattr(parameter, "ds_tensor"):
            import torch.distributed as dist

            whole = parameter.ds_tensor.ds_numel * dist.get_world_size(parameter.ds_process_group)
            padding += times * (whole - parameter.ds_numel)
            held += times * parameter.ds_numel
        else:
            held += times * parameter.numel()
    return held, padding
