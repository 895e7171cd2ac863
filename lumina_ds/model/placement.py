"""Which experts really compute a token when every expert has a limited capacity: drop or reroute.

Called by the router (router.py) once the order of preference is known; nothing here carries a gradient.
Shape suffixes: T tokens, E experts, K experts per token, R ranks of the order of preference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UNPLACED = -1


def expert_capacity(capacity_factor: Tensor | float, num_tokens: Tensor, top_k: int, num_experts: int) -> Tensor:
    """ceil(capacity_factor * tokens * k / experts), int64 scalar (GShard, arXiv 2006.16668, section 2.2).

    In float64: an integral product must not be lifted by a rounding error, so a billionth is taken off first.
    """
    even = torch.as_tensor(capacity_factor, dtype=torch.float64) * num_tokens.double() * (top_k / num_experts)
    return (even - 1e-9).ceil().long()


def place(preference_TR: Tensor, real_T: Tensor, capacity: Tensor, num_experts: int, top_k: int) -> Tensor:
    """Expert of each of a token's `top_k` places [T, K], UNPLACED where none had room; int64.

    All first preferences come before all second ones, and within one rank earlier tokens before later ones (GShard):
    at each rank a token that still lacks an expert asks its expert of that rank, which takes it while there is
    room. With R = K ranks an overflow is dropped; with R = E it goes on to the token's next choice with room. Tokens
    that are not `real_T` ask nobody.
    """
    num_tokens, num_ranks = preference_TR.shape
    room_E = capacity.to(preference_TR.device).expand(num_experts).clone()
    num_placed_T = torch.zeros(num_tokens, dtype=torch.int64, device=preference_TR.device)
    # One column more than needed takes what is not placed, so that the scatter needs no selection.
    placed_TK = torch.full((num_tokens, top_k + 1), UNPLACED, device=preference_TR.device)
    for rank in range(num_ranks):
        expert_T1 = preference_TR[:, rank : rank + 1]
        asks_T = real_T & (num_placed_T < top_k)
        if rank >= top_k and not bool((asks_T.any() & (room_E > 0).any()).item()):
            break
        asked_TE = F.one_hot(expert_T1.squeeze(1), num_experts) * asks_T.unsqueeze(1)
        turn_T = asked_TE.cumsum(0).gather(1, expert_T1).squeeze(1)
        taken_T = asks_T & (turn_T <= room_E[expert_T1.squeeze(1)])
        slot_T = torch.where(taken_T, num_placed_T, top_k)
        placed_TK.scatter_(1, slot_T.unsqueeze(1), expert_T1)
        num_placed_T += taken_T
        room_E -= (asked_TE * taken_T.unsqueeze(1)).sum(0)
    return placed_TK[:, :top_k].contiguous()


def fill_unplaced(placed_TK: Tensor, num_experts: int) -> Tensor:
    """`placed_TK` with every UNPLACED entry at some expert; its weight must be zero.

    DeepSpeed's dispatch moves exactly T * K rows, so what is dropped, and padding, is computed all the same. Spread
    like this it makes no expert busier than the busiest one is already, or than an even share.
    """
    flat = placed_TK.flatten()
    is_free = flat == UNPLACED
    load_E = count_places(placed_TK, num_experts)
    level = load_E.max().clamp(min=-(-flat.numel() // num_experts))
    room_E = (level - load_E).cumsum(0)
    number_N = is_free.long().cumsum(0) - 1
    filler_N = torch.searchsorted(room_E, number_N, right=True).clamp(max=num_experts - 1)
    return torch.where(is_free, filler_N, flat).view_as(placed_TK)


def count_places(placed_TK: Tensor, num_experts: int) -> Tensor:
    """How many places each expert has, UNPLACED ones left out; int64 [E]."""
    flat = placed_TK.flatten() + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[1:]
