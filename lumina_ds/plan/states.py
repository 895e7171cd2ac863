"""Bytes that parameters, optimizer and gradients take on one rank under DeepSpeed 0.19.8.

The formulas follow deepspeed/runtime/zero/stage_1_and_2.py and stage3.py, padding included, and were
checked against the live tensors of real engines.

Symbols: n elements of an optimizer group on this rank, W ranks that partition it, b bytes of a
parameter, g bytes of an accumulated gradient element, N = n padded to a multiple of 2W, P = N / W.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from lumina_ds.config.deepspeed.tree import section_of
from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.schema import ModelConfig
from lumina_ds.config.tensors import ParameterTensor, cached_by_model, parameter_tensors

# deepspeed/moe/utils.py, split_params_into_different_moe_groups_for_optimizer: max_group_size.
_MAX_EXPERT_GROUP = 178_956_971
# deepspeed/runtime/engine.py, MEMORY_OPT_ALLREDUCE_SIZE: elements flattened at once at stage 0.
_STAGE_0_BUCKET = 500_000_000
_DTYPE_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}


@dataclass(frozen=True)
class OptimizerGroup:
    """Element counts of one group's tensors as one rank holds them, and how many ranks share them.

    A Muon group has one momentum instead of `moment_bytes` of fp32 states per element. `step_bytes` are what a step
    that is not fused makes beside them.
    """

    name: str
    tensors: tuple[int, ...]
    data_parallel_size: int
    is_muon: bool = False
    moment_bytes: int = 8
    step_bytes: int = 8

    @cached_property
    def numel(self) -> int:
        return sum(self.tensors)

    @cached_property
    def padded(self) -> int:
        """N: stage_1_and_2.py aligns the flat buffer to 2 elements per rank."""
        return -(-self.numel // (2 * self.data_parallel_size)) * 2 * self.data_parallel_size

    @property
    def partition(self) -> int:
        """P, this rank's share of N."""
        return self.padded // self.data_parallel_size

    @cached_property
    def shards(self) -> int:
        """The stage 3 share: every tensor is split on its own, each rounded up."""
        return sum(-(-numel // self.data_parallel_size) for numel in self.tensors)


@dataclass(frozen=True)
class ZeroSettings:
    """What the `zero_optimization` section says that costs memory; DeepSpeed's defaults where it says nothing."""

    stage: int
    reduce_bucket_size: int
    overlap_comm: bool
    contiguous_gradients: bool
    prefetch_bucket_size: int
    persistence_threshold: int
    max_live_parameters: int
    max_reuse_distance: int
    sub_group_size: int
    offload_optimizer: str
    offload_param: str
    gradient_bytes: int
    fused_optimizer: bool

    @classmethod
    def from_json(cls, json: Mapping[str, Any], parameter_bytes: int) -> ZeroSettings:
        zero = section_of(json, "zero_optimization")
        stage = int(zero.get("stage", 0))
        overlap = zero.get("overlap_comm")
        accumulation = section_of(json, "data_types").get("grad_accum_dtype")
        return cls(
            stage=stage,
            reduce_bucket_size=int(zero.get("reduce_bucket_size", 5e8)),
            overlap_comm=stage == 3 if overlap is None else bool(overlap),
            contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
            prefetch_bucket_size=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            max_live_parameters=int(zero.get("stage3_max_live_parameters", 1e9)),
            max_reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
            sub_group_size=int(zero.get("sub_group_size", 1e9)),
            offload_optimizer=section_of(json, "zero_optimization.offload_optimizer").get("device", "none"),
            offload_param=section_of(json, "zero_optimization.offload_param").get("device", "none"),
            gradient_bytes=_DTYPE_BYTES.get(str(accumulation), parameter_bytes),
            fused_optimizer=section_of(json, "optimizer.params").get("fused") is True,
        )


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank. `gradients` is the height during backward, `step_gradients` what the optimizer step
    begins with; `resident_*` stays between micro-batches; `bucket` is the height during backward, `early_bucket` what
    its beginning has of it; `step_bucket` is there in the
    optimizer's step; `flattened` is a reduction's copy of the bucket, `reduced_gradients` what is there beside it;
    `released` is what stage 3 lets go of its parameters for
    the optimizer's step; `host` is offloaded."""

    parameters: int = 0
    master_weights: int = 0
    moments: int = 0
    gradients: int = 0
    step_gradients: int = 0
    resident_gradients: int = 0
    bucket: int = 0
    early_bucket: int = 0
    flattened: int = 0
    reduced_gradients: int = 0
    resident_bucket: int = 0
    step_bucket: int = 0
    step: int = 0
    released: int = 0
    host: int = 0


@cached_by_model
def optimizer_groups(
    model: ModelConfig, world_size: int, expert_parallel_size: int, optimizer: str = "adamw"
) -> list[OptimizerGroup]:
    """The groups the engine ends up with: `decay` (matrices), `no_decay` (norms), and the experts, which
    DeepSpeed's configure_moe_param_groups takes out of `decay` and cuts at 178,956,971 elements. Under Muon, which
    takes the experts too, `decay` keeps what is left to AdamW (engine/deepspeed/muon.py)."""
    entry = OPTIMIZERS[optimizer]
    uses_muon = bool(entry.own_kinds)
    muon: list[ParameterTensor] = []
    decay: list[int] = []
    no_decay: list[int] = []
    experts: list[ParameterTensor] = []
    for tensor in parameter_tensors(model):
        if tensor.kind == "experts":
            experts.append(tensor)
        elif tensor.kind == "norm":
            no_decay.append(tensor.numel)
        elif tensor.kind in entry.own_kinds:
            muon.append(tensor)
        else:
            decay.append(tensor.numel)
    groups = [OptimizerGroup("muon", _by_shape(muon), world_size, is_muon=True)] if uses_muon else []
    groups += [
        OptimizerGroup("decay", tuple(decay), world_size),
        OptimizerGroup("no_decay", tuple(no_decay), world_size),
    ]
    expert_ranks = world_size // expert_parallel_size
    for chunk in _cut(experts, expert_parallel_size):
        sizes = _by_shape(chunk) if uses_muon else tuple(tensor.numel for tensor in chunk)
        held = tuple(size // expert_parallel_size for size in sizes)
        groups.append(OptimizerGroup("experts", held, expert_ranks, uses_muon))
    return [replace(group, moment_bytes=entry.moment_bytes, step_bytes=entry.step_bytes) for group in groups]


def moment_bytes(groups: Sequence[OptimizerGroup], zero: ZeroSettings, parameter_bytes: int) -> int:
    """Bytes of the optimizer's states on one rank, wherever they are kept."""
    if zero.stage in (0, 3):
        return sum(group.moment_bytes * (group.shards if zero.stage else group.numel) for group in groups)
    adam = sum(group.moment_bytes * group.partition for group in groups if not group.is_muon)
    return adam + momentum_bytes(zero, parameter_bytes) * moment_elements(groups)[1]


def moment_elements(groups: Sequence[OptimizerGroup]) -> tuple[int, int]:
    """(elements with states in fp32, elements with Muon's momentum) at stages 1 and 2.

    Muon's is as wide as a gradient, and whole for every tensor that touches the partition
    (_muon_momentum_buffer of stage_1_and_2.py).
    """
    adam = sum(group.partition for group in groups if not group.is_muon)
    muon = [group for group in groups if group.is_muon]
    return adam, _fullest_rank([], muon) if muon else 0


def momentum_bytes(zero: ZeroSettings, parameter_bytes: int) -> int:
    """Bytes of an element of Muon's momentum; stage 2 hands it gradients in the parameters' type."""
    return zero.gradient_bytes if zero.stage == 1 else parameter_bytes


def state_bytes(
    groups: Sequence[OptimizerGroup],
    zero: ZeroSettings,
    parameter_bytes: int,
    bucket_bytes: int,
    accumulation_steps: int,
) -> StateBytes:
    """Bytes of one rank (the fullest one, where ranks differ).

    `bucket_bytes` is the width of a bucket element summed over DeepSpeed's buckets (autocast keeps two). What stage 3
    gathers is in gathering.py.
    """
    if zero.stage == 0:
        return _stage_0(groups, zero, parameter_bytes, accumulation_steps)
    if zero.stage == 3:
        return _stage_3(groups, zero, parameter_bytes, bucket_bytes)
    states = _stage_1_and_2(groups, zero, parameter_bytes, bucket_bytes, accumulation_steps)
    if zero.offload_optimizer == "none":
        return states
    return _offload_1_and_2(states, groups, zero, parameter_bytes, zero.stage == 2 and accumulation_steps > 1)


def _stage_0(groups: Sequence[OptimizerGroup], zero: ZeroSettings, b: int, accumulation_steps: int) -> StateBytes:
    """Plain torch AdamW: b n + 8 n, gradients b n, freed by the step; the all-reduce flattens up to 5e8 elements."""
    n = sum(group.numel for group in groups)
    shared = [group for group in groups if group.data_parallel_size > 1]
    flattened = max((min(group.numel, _STAGE_0_BUCKET) for group in shared), default=0)
    return StateBytes(
        parameters=b * n,
        moments=moment_bytes(groups, zero, b),
        gradients=b * n,
        step_gradients=b * n,
        resident_gradients=b * n if accumulation_steps > 1 else 0,
        bucket=b * flattened,
    )


def _stage_1_and_2(
    groups: Sequence[OptimizerGroup], zero: ZeroSettings, b: int, bucket_bytes: int, accumulation_steps: int
) -> StateBytes:
    """b N + 4 P master (in fp32 too) + 8 P moments; per group the step needs 4 P, and b P before the cast."""
    n = sum(group.numel for group in groups)
    padded = sum(group.padded for group in groups)
    partition = sum(group.partition for group in groups)
    g = zero.gradient_bytes
    dedicated_bf16 = zero.stage == 1 and b == 2 and g == 4 and zero.offload_optimizer == "none"
    if dedicated_bf16:
        # runtime/bf16_optimizer.py keeps fp32 gradients of the whole model, and zeroes the backward's own in place.
        gradients = in_step = resident = 4 * padded + 2 * n
    elif g != b:
        # A compact buffer of this rank's share; stage 1 has the whole gradients beside it until the boundary.
        in_step = g * partition
        gradients, resident = (in_step + g * n, g * n) if zero.stage == 1 else (in_step, in_step)
    else:
        # Muon's updates are new tensors; in a contiguous buffer their gradients stay beside them.
        updates = [group for group in groups if group.is_muon] if zero.contiguous_gradients else []
        in_step = b * _fullest_rank(groups, updates)
        # Stage 1 keeps every gradient until the boundary, where the padding joins them.
        gradients, resident = (b * padded, b * n) if zero.stage == 1 else (in_step, in_step)
    # Without contiguous gradients there is no standing buffer, only what one reduction flattens.
    elements = zero.reduce_bucket_size if zero.contiguous_gradients else min(zero.reduce_bucket_size, n)
    bucket = elements * bucket_bytes * (2 if zero.overlap_comm else 1)
    # A reduction flattens what one process group shares.
    shared = [group for group in groups if group.data_parallel_size > 1]
    sizes = {group.data_parallel_size: 0 for group in shared}
    for group in shared:
        sizes[group.data_parallel_size] += group.numel
    largest = max(sizes.values(), default=0)
    cast = 4 if b == 4 else 4 + b
    return StateBytes(
        parameters=b * padded,
        master_weights=4 * partition,
        moments=moment_bytes(groups, zero, b),
        gradients=gradients,
        step_gradients=in_step,
        resident_gradients=resident if accumulation_steps > 1 or dedicated_bf16 else 0,
        bucket=bucket,
        early_bucket=bucket if zero.contiguous_gradients else 0,
        flattened=min(bucket_bytes, 4) * min(zero.reduce_bucket_size, largest) if zero.contiguous_gradients else 0,
        reduced_gradients=gradients if zero.stage == 1 else round(gradients * max(0, n - zero.reduce_bucket_size) / n),
        # Stage 2 lets its bucket go after every backward pass.
        resident_bucket=bucket if accumulation_steps > 1 and zero.stage == 1 and zero.contiguous_gradients else 0,
        step=0 if dedicated_bf16 else max((cast + _step_bytes(group, zero)) * group.partition for group in groups),
    )


def _offload_1_and_2(
    states: StateBytes, groups: Sequence[OptimizerGroup], zero: ZeroSettings, b: int, accumulates: bool
) -> StateBytes:
    """Device b N + b max_numel + bucket; host 16 P (master, gradient, moments) + b P + b max_numel, and where stage 2
    accumulates micro-batches b times every tensor that touches this rank's share."""
    accumulated = b * _fullest_rank([], groups) if accumulates else 0
    largest = max(max(group.tensors) for group in groups)
    partition = sum(group.partition for group in groups)
    return StateBytes(
        parameters=states.parameters,
        gradients=b * largest,
        step_gradients=b * largest,
        resident_gradients=b * largest,
        bucket=states.bucket,
        early_bucket=states.early_bucket,
        flattened=states.flattened,
        resident_bucket=states.resident_bucket,
        host=moment_bytes(groups, zero, b) + (8 + b) * partition + b * largest + accumulated,
    )


def _stage_3(groups: Sequence[OptimizerGroup], zero: ZeroSettings, b: int, bucket_bytes: int) -> StateBytes:
    """b (P + persistent) + 4 P + 8 P + g P permanent gradients + the bucket, with P = sum of ceil(numel / W)."""
    shards = sum(group.shards for group in groups)
    parameters_on_host = zero.offload_param != "none"
    # A partition of a single rank is the whole tensor: gathering it copies nothing unless it comes from the host.
    copied = [group for group in groups if group.data_parallel_size > 1 or parameters_on_host]
    persistent = sum(
        -(-numel // group.data_parallel_size) * group.data_parallel_size
        for group in copied
        for numel in group.tensors
        if numel <= zero.persistence_threshold
    )
    bucket = zero.reduce_bucket_size * bucket_bytes if zero.contiguous_gradients else 0
    g = zero.gradient_bytes
    moments = moment_bytes(groups, zero, b)
    stepped = min(max(group.shards for group in groups), zero.sub_group_size)
    optimizer_on_host = zero.offload_optimizer != "none"
    # Gradients are flattened, and in 16 bits cast to fp32.
    cast = 4 if b == 4 else 4 + b
    return StateBytes(
        parameters=b * (persistent if parameters_on_host else shards + persistent),
        master_weights=0 if optimizer_on_host else 4 * shards,
        moments=0 if optimizer_on_host else moments,
        gradients=0 if optimizer_on_host else g * shards,
        step_gradients=0 if optimizer_on_host else g * shards,
        resident_gradients=0 if optimizer_on_host else g * shards,
        bucket=bucket,
        early_bucket=bucket,
        flattened=bucket if copied else 0,
        reduced_gradients=0 if optimizer_on_host else g * shards,
        resident_bucket=bucket,
        step_bucket=bucket,
        step=0 if optimizer_on_host else (cast + max(_step_bytes(group, zero) for group in groups)) * stepped,
        released=b * persistent,
        host=((8 + g) * shards + moments if optimizer_on_host else 0) + (b * shards if parameters_on_host else 0),
    )


def _step_bytes(group: OptimizerGroup, zero: ZeroSettings) -> int:
    return 0 if zero.fused_optimizer else group.step_bytes


def _fullest_rank(groups: Sequence[OptimizerGroup], unpadded: Sequence[OptimizerGroup] = ()) -> int:
    """Elements of gradients that the fullest rank keeps for the step: the whole of every tensor that touches its
    partition, plus, but for `unpadded`, the padding behind the last element."""
    # Layers of experts are groups of one size.
    listed = Counter([(group, True) for group in groups] + [(group, False) for group in unpadded])
    world_size = max(group.data_parallel_size for group, _ in listed)
    kept = [0] * world_size
    for (group, with_padding), times in listed.items():
        # Ranks that hold different experts of one set share a partition's place.
        ranks_per_partition = world_size // group.data_parallel_size
        for partition, touched in enumerate(_touched_by_partition(group, with_padding)):
            for rank in range(partition * ranks_per_partition, (partition + 1) * ranks_per_partition):
                kept[rank] += times * touched
    return max(kept)


@lru_cache(maxsize=256)
def _touched_by_partition(group: OptimizerGroup, with_padding: bool) -> list[int]:
    ends = list(accumulate(group.tensors))
    total = ends[-1]
    touched = []
    for begin in range(0, group.padded, group.partition):
        end = begin + group.partition
        first, last = bisect_right(ends, begin), bisect_left(ends, min(end, total))
        inside = ends[last] - (ends[first - 1] if first else 0) if begin < total else 0
        touched.append(inside + (max(0, end - max(begin, total)) if with_padding else 0))
    return touched


def _cut(tensors: Sequence[ParameterTensor], expert_parallel_size: int) -> list[list[ParameterTensor]]:
    """Cut expert tensors into groups of at most _MAX_EXPERT_GROUP elements on a rank, in order; a larger one stands
    alone."""
    groups: list[list[ParameterTensor]] = []
    held = 0
    for tensor in tensors:
        numel = tensor.numel // expert_parallel_size
        if not groups or held + numel > _MAX_EXPERT_GROUP:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += numel
    return groups


def _by_shape(tensors: Sequence[ParameterTensor]) -> tuple[int, ...]:
    """DeepSpeed's Muon keeps its matrices by shape, the largest first (zero/muon/original_muon.py)."""
    return tuple(tensor.numel for tensor in sorted(tensors, key=lambda tensor: tensor.shape, reverse=True))
