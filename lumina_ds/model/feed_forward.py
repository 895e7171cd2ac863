"""RMSNorm and the dense SwiGLU feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467) over the last dimension.

    Computed in fp32, since a mean of squares in bf16 keeps only eight bits; returned in x's type.
    """
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    """A norm with its weight; `norm` computes it, as `rms_norm` does."""

    def __init__(self, size: int, eps: float, norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (Shazeer, arXiv 2002.05202); `activate` is `swiglu` or like it."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activate: Callable[[Tensor, Tensor], Tensor] = swiglu
    ) -> None:
        super().__init__()
        self.activate = activate
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(self.gate_proj(x), self.up_proj(x)))
