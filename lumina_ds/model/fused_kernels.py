"""Fused Triton kernels of Liger (extra: fused) with the signatures of kernels.py.

They are for CUDA GPUs; Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU too, slowly, for tests.
engine/kernel_choice.py decides which a run takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lumina_ds.model.graph_breaks import outside_graphs
from lumina_ds.model.loss import IGNORED, multiplied_dtype

# What follows the labels, by position, since autograd functions take no keywords. The weight's gradient is added up in
# fp32, for in bf16 every chunk would round it once more.
_CROSS_ENTROPY_ARGUMENTS = {
    "bias": None,
    "ce_weight": None,
    "ignore_index": IGNORED,
    "lse_square_scale": 0.0,
    "label_smoothing": 0.0,
    "reduction": "sum",
    "softcap": None,
    "return_z_loss": False,
    "accum_dtype": torch.float32,
}


@outside_graphs
def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma" is the mode that stays in fp32 to the end, as ours does. Not in place: the gradient that comes in may be
    # the residual stream's too.
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)


@outside_graphs
def liger_rope(q_BSHC: Tensor, k_BSKC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites q and k, the outputs of projections or norms, which nothing else reads."""
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = LigerRopeFunction.apply(q_BSHC.transpose(1, 2), k_BSKC.transpose(1, 2), cos_BSC, sin_BSC)
    return q.transpose(1, 2), k.transpose(1, 2)


@outside_graphs
def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


@outside_graphs
def liger_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> Tensor:
    """Liger cuts its own chunks, about as many tokens as make logits of the hidden states' size: not `chunk_tokens`."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    dtype = multiplied_dtype(hidden_ND)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
            hidden_ND.to(dtype),
            weight_VD.to(dtype),
            labels_N,
            *_CROSS_ENTROPY_ARGUMENTS.values(),
        )
    return loss
