"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Llama and Qwen.

Shape legend for the whole model package: B rows, S tokens of a row, T = B*S tokens, D hidden width,
H query heads, K key/value heads, C head width, E experts, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, C] in fp32 for integer positions [B, S].

    Always fp32: in bf16 neighbouring positions beyond 256 round to the same angle.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles_BSC2 = position_ids.float().unsqueeze(-1) * theta**-exponents
    angles_BSC = torch.cat((angles_BSC2, angles_BSC2), dim=-1)
    return angles_BSC.cos(), angles_BSC.sin()


def rotate_queries_and_keys(q_BSHC: Tensor, k_BSKC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """Both rotated by their tokens' positions."""
    return apply_rotary(q_BSHC, cos_BSC, sin_BSC), apply_rotary(k_BSKC, cos_BSC, sin_BSC)


def apply_rotary(x_BSHC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """Rotate every head of x [B, S, H, C] by its position; computed in fp32, returned in x's type."""
    x = x_BSHC.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos_BSC.unsqueeze(2) + rotated * sin_BSC.unsqueeze(2)).to(x_BSHC.dtype)
