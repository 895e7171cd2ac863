"""Bytes that one rank sends in one optimizer step, by kind of collective.

A ring moves (W - 1) / W of a buffer per all-gather or reduce-scatter and twice that per all-reduce. DeepSpeed
0.19.8 all-reduces gradient buckets at the stages 0 to 2 (stage_1_and_2.py, average_tensor, with its default
use_multi_rank_bucket_allreduce), at stage 2 after every micro-batch; stage 3 gathers parameters before the
forward and before the backward pass and reduce-scatters gradients, for every micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lumina_ds.config.schema import ModelConfig
from lumina_ds.config.tensors import moe_layers
from lumina_ds.plan.states import OptimizerGroup, ZeroSettings


@dataclass(frozen=True)
class Communication:
    """Bytes sent per rank and step; `host` is what offloading moves between GPU and host memory."""

    all_reduce: int
    all_gather: int
    reduce_scatter: int
    all_to_all: int
    host: int

    @property
    def network_bytes(self) -> int:
        """Everything between ranks."""
        return self.all_reduce + self.all_gather + self.reduce_scatter + self.all_to_all


def communication_bytes(
    model: ModelConfig,
    groups: Sequence[OptimizerGroup],
    zero: ZeroSettings,
    parameter_bytes: int,
    tokens: int,
    accumulation_steps: int,
    expert_parallel_size: int,
    checkpointing: bool,
    operand_bytes: int,
) -> Communication:
    """`tokens` are those of a micro-batch; `operand_bytes` the width of the activations that experts receive."""
    b, g, micro_batches = parameter_bytes, zero.gradient_bytes, accumulation_steps
    all_reduce = all_gather = reduce_scatter = 0.0
    for group in groups:
        ring = (group.data_parallel_size - 1) / group.data_parallel_size
        if zero.stage == 3:
            gathered = sum(numel for numel in group.tensors if numel > zero.persistence_threshold)
            all_gather += 2 * micro_batches * ring * b * gathered
            reduce_scatter += micro_batches * ring * g * group.numel
        else:
            all_reduce += (micro_batches if zero.stage == 2 else 1) * 2 * ring * g * group.numel
            all_gather += ring * b * group.padded if zero.stage else 0
    return Communication(
        all_reduce=round(all_reduce),
        all_gather=round(all_gather),
        reduce_scatter=round(reduce_scatter),
        all_to_all=round(
            micro_batches * _all_to_all(model, tokens, expert_parallel_size, checkpointing, operand_bytes)
        ),
        host=_host(groups, zero, b, g, micro_batches),
    )


def _all_to_all(model: ModelConfig, tokens: int, size: int, checkpointing: bool, width: int) -> float:
    """Dispatch and combine, forward and backward, once more forward under recomputation: k rows of width d a token."""
    if size == 1:
        return 0.0
    exchanges = 6 if checkpointing else 4
    rows = tokens * model.num_experts_per_tok * (size - 1) / size
    return len(moe_layers(model)) * exchanges * rows * model.hidden_size * width


def _host(groups: Sequence[OptimizerGroup], zero: ZeroSettings, b: int, g: int, micro_batches: int) -> int:
    """Gradients down and updated parameters up, a rank's share each; offloaded parameters up twice a micro-batch."""
    share = sum(group.shards if zero.stage == 3 else group.partition for group in groups)
    moved = 0
    if zero.offload_optimizer != "none":
        moved += (g * micro_batches + b) * share
    if zero.offload_param != "none":
        moved += 2 * b * micro_batches * share
    return moved
