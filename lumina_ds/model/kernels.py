"""The element-wise parts of the model that a fused kernel may compute, each a function with one signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lumina_ds.model.feed_forward import rms_norm, swiglu
from lumina_ds.model.loss import chunked_cross_entropy
from lumina_ds.model.rope import rotate_queries_and_keys


@dataclass(frozen=True)
class Kernels:
    """What a model computes with; the defaults are plain PyTorch and the references of fused_kernels.py.

    rms_norm(x [..., D], weight [D], eps) -> [..., D];
    rope(q [B, S, H, C], k [B, S, K, C], cosines and sines [B, S, C] in fp32) -> both rotated;
    swiglu(gate, up) -> their shape; cross_entropy(hidden [N, D], weight [V, D], labels [N], chunk) -> the fp32 sum.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotate_queries_and_keys
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    cross_entropy: Callable[[Tensor, Tensor, Tensor, int], Tensor] = chunked_cross_entropy


PLAIN = Kernels()
