"""Steps of DeepSpeed's that do nothing on one rank but cost passes over all gradients.

DeepSpeed 0.19.8 copies every gradient to flat buffers, sums those over one rank, divides by one, and copies the result
back. A contract test tells when another version does it differently.
"""

from __future__ import annotations

from typing import Any

from lumina_ds.engine.deepspeed.changes import Need, replace

_OPTIMIZER = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
NEEDS = (
    Need("deepspeed:DeepSpeedEngine.enable_backward_allreduce"),
    Need(
        "deepspeed:DeepSpeedEngine._backward_epilogue",
        contains="if self.enable_backward_allreduce and not self.inside_no_sync_ctxt:",
    ),
    Need(f"{_OPTIMIZER}.contiguous_gradients"),
    Need(f"{_OPTIMIZER}.average_tensor", "self tensor communication_data_type"),
    Need(f"{_OPTIMIZER}.buffered_reduce_fallback", "self rank grads communication_data_type elements_per_buffer"),
)


def skip_reduction(engine: Any) -> bool:
    """Let a ZeRO 0 to 2 engine of one rank keep its gradients where they are; whether it does."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if engine.world_size != 1 or stage > 2:
        return False
    if stage == 0:
        replace(engine, "enable_backward_allreduce", False)
        return True
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    # Stage 1 in bf16 with fp32 gradients has an optimizer of its own.
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return False
    # With an accumulator of another type, or with offload, the reduction is also what moves the gradients there.
    if optimizer.cpu_offload or optimizer.gradient_accumulation_dtype != optimizer.dtype:
        return False
    # Without contiguous gradients none is copied, and what would reduce them in place has nothing to do. That its
    # constructor asks for them where there are experts is about ranks that share them. Muon reads the copies.
    if not any(group.get("use_muon") for group in optimizer.param_groups):
        replace(optimizer, "contiguous_gradients", False)
    replace(optimizer, "average_tensor", _average_over_one_rank)
    replace(optimizer, "buffered_reduce_fallback", _reduce_over_one_rank)
    return True


def _average_over_one_rank(tensor: Any, communication_data_type: Any) -> None:
    """In the place of DeepSpeedZeroOptimizer.average_tensor, which works in place."""


def _reduce_over_one_rank(rank: Any, grads: Any, communication_data_type: Any, elements_per_buffer: int = 0) -> None:
    """In the place of DeepSpeedZeroOptimizer.buffered_reduce_fallback, which works in place."""
