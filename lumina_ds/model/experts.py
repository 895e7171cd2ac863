"""The experts of one MoE layer, and how tokens get to them and back.

On a CPU one autograd function does it all, expert by expert, in gradients allocated once (`_MixOnCpu`); elsewhere
torch's grouped matrix product does, under autograd. `experts_reference` is the slow oracle of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_ds.model.cpu_products import product_dtype
from lumina_ds.model.graph_breaks import outside_graphs


class Experts(nn.Module):
    """E SwiGLU experts as three tensors: w1 (gate) and w3 (up) [E, F, D], w2 (down) [E, D, F]."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.w3 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(
        self, x: Tensor, counts_E: Tensor, weights_TK: Tensor | None = None, indices_TK: Tensor | None = None
    ) -> Tensor:
        """Tokens [T, D] to the weighted sums [T, D] of their experts, given a router's output.

        Without `weights_TK` and `indices_TK`: rows [N, D], sorted by expert, to rows [N, D]; what comes after the
        counted ones is padding and becomes zero.
        """
        if weights_TK is None or indices_TK is None:
            weights = torch.ones(len(x), device=x.device)
            rows = torch.arange(len(x), device=x.device)
            plan = RowPlan(rows, rows, rows.unsqueeze(1), counts_E)
        else:
            plan = RowPlan.of(indices_TK, counts_E)
            weights = weights_TK.flatten()
        mix = mix_on_cpu if x.device.type == "cpu" else mix_grouped
        return mix(x, weights, plan, self.w1, self.w2, self.w3)


class RowPlan:
    """Where each of the N = T*K assignments goes: rows sorted by expert, `counts_E` of them for each.

    `slot_N` is the assignment (token * K + choice) of a row, `token_N` its token, `row_TK` the row of an assignment.
    """

    def __init__(self, slot_N: Tensor, token_N: Tensor, row_TK: Tensor, counts_E: Tensor) -> None:
        self.slot_N, self.token_N, self.row_TK, self.counts_E = slot_N, token_N, row_TK, counts_E

    @classmethod
    def of(cls, indices_TK: Tensor, counts_E: Tensor) -> RowPlan:
        top_k = indices_TK.shape[1]
        slot_N = indices_TK.flatten().argsort(stable=True)
        rows = torch.arange(len(slot_N), device=slot_N.device)
        row_TK = torch.empty_like(slot_N).scatter_(0, slot_N, rows).view_as(indices_TK)
        return cls(slot_N, slot_N.div(top_k, rounding_mode="floor"), row_TK, counts_E)


def experts_reference(x_TD: Tensor, weights_N: Tensor, plan: RowPlan, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Expert by expert under autograd, and the weighted sum in fp32: slow, obvious, the oracle of the others."""
    counts = plan.counts_E.tolist()
    # unbind: its backward stacks the gradients once; w[e] would write a full [E, ...] zero tensor per expert.
    experts = zip(w1.unbind(), w2.unbind(), w3.unbind(), strict=True)
    outputs = [
        F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        for x, (gate, down, up) in zip(x_TD[plan.token_N][: sum(counts)].split(counts), experts, strict=True)
    ]
    slots_ND = x_TD.new_zeros(len(plan.slot_N), x_TD.shape[1])
    slots_ND = slots_ND.index_copy(0, plan.slot_N[: sum(counts)], torch.cat(outputs))
    weighted = slots_ND.float() * weights_N.float().unsqueeze(1)
    return weighted.view(*plan.row_TK.shape, -1).sum(dim=1).to(x_TD.dtype)


def mix_grouped(x_TD: Tensor, weights_N: Tensor, plan: RowPlan, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """The same by torch's grouped product, which waits for no count on the host."""
    if x_TD.shape[1] * x_TD.element_size() % 16 or w1.shape[1] * x_TD.element_size() % 16:
        # The grouped product takes rows of a multiple of 16 bytes only.
        return experts_reference(x_TD, weights_N, plan, w1, w2, w3)
    w1, w2, w3 = (w.to(x_TD.dtype).transpose(1, 2) for w in (w1, w2, w3))
    ends_E = plan.counts_E.cumsum(0, dtype=torch.int32)
    x_ND = _Gather.apply(x_TD, plan.token_N, plan.row_TK)
    gate_NF, up_NF = F.grouped_mm(x_ND, w1, offs=ends_E), F.grouped_mm(x_ND, w3, offs=ends_E)
    weights_N1 = weights_N[plan.slot_N].unsqueeze(1).to(x_TD.dtype)
    # The weight goes in before the last product: the product is linear, and its output need not be kept.
    hidden_NF = F.silu(gate_NF) * up_NF * weights_N1
    return _Combine.apply(F.grouped_mm(hidden_NF, w2, offs=ends_E), plan.token_N, plan.row_TK)


@outside_graphs
def mix_on_cpu(x_TD: Tensor, weights_N: Tensor, plan: RowPlan, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """The same in one function with a backward of its own, in x's type."""
    return _MixOnCpu.apply(x_TD, weights_N, plan, w1, w2, w3)


class _Gather(torch.autograd.Function):
    """Rows of tokens. Its backward sums each token's rows, where autograd's own would add them one at a time."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.row_TK = row_TK
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _sum_rows(gradient_ND, ctx.row_TK), None, None


class _Combine(torch.autograd.Function):
    """Tokens as sums of their rows: the transpose of _Gather."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.token_N = token_N
        return _sum_rows(x_ND, row_TK)

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient_TD.index_select(0, ctx.token_N), None, None


class _MixOnCpu(torch.autograd.Function):
    """Gather, SwiGLU of every expert, weighted sum. An expert's rows stay in the cache between its products.

    Kept for the backward: the gathered rows and the two projections. silu and the product of the two are computed
    again, which costs less than reading them would.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # the types are chosen here
    def forward(ctx: Any, x_TD: Tensor, weights_N: Tensor, plan: RowPlan, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        dtype = x_TD.dtype
        ctx.types = weights_N.dtype, w1.dtype
        w1, w2, w3 = (w.to(dtype) for w in (w1, w2, w3))
        ctx.counts = counts = plan.counts_E.tolist()
        ctx.plan = plan
        ctx.product = product = product_dtype(dtype, "cpu")
        x_ND = x_TD.index_select(0, plan.token_N)
        weights_N1 = weights_N.index_select(0, plan.slot_N).to(dtype).unsqueeze(1)
        gate_NF, up_NF = (x_ND.new_empty(len(x_ND), w1.shape[1]) for _ in range(2))
        out_ND = torch.empty_like(x_ND)
        out_ND[sum(counts) :].zero_()
        for expert, rows in _expert_rows(counts):
            x = x_ND[rows].to(product)
            gate = _multiply(x, w1[expert].to(product).T, gate_NF[rows])
            up = _multiply(x, w3[expert].to(product).T, up_NF[rows])
            hidden = F.silu(gate).mul_(up).mul_(weights_N1[rows])
            _multiply(hidden, w2[expert].to(product).T, out_ND[rows])
        ctx.save_for_backward(x_ND, weights_N1, gate_NF, up_NF, w1, w2, w3)
        return _sum_rows(out_ND, plan.row_TK)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_ND, weights_N1, gate_NF, up_NF, w1, w2, w3 = ctx.saved_tensors
        plan, product = ctx.plan, ctx.product
        gradient_ND = gradient_TD.index_select(0, plan.token_N)
        d_w1, d_w2, d_w3 = (torch.empty_like(w) for w in (w1, w2, w3))
        d_x_ND = torch.empty_like(x_ND)
        d_x_ND[sum(ctx.counts) :].zero_()
        d_weights_N = torch.zeros(len(x_ND), dtype=torch.float32)
        for expert, rows in _expert_rows(ctx.counts):
            x, gate, up, weights, d_out = (
                part[rows].to(product) for part in (x_ND, gate_NF, up_NF, weights_N1, gradient_ND)
            )
            d_hidden = d_out @ w2[expert].to(product)
            activated = F.silu(gate)
            hidden = activated * up
            torch.sum(hidden * d_hidden, dim=1, dtype=torch.float32, out=d_weights_N[rows])
            _multiply(d_out.T, hidden.mul_(weights), d_w2[expert])
            d_hidden.mul_(weights)
            d_up = activated.mul_(d_hidden)
            d_gate = torch.ops.aten.silu_backward(d_hidden.mul_(up), gate)
            _multiply(d_gate.T, x, d_w1[expert])
            _multiply(d_up.T, x, d_w3[expert])
            d_x_ND[rows] = torch.mm(d_gate, w1[expert].to(product)).addmm_(d_up, w3[expert].to(product))
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                for gradient in (d_w1, d_w2, d_w3):
                    gradient[expert].zero_()
        weights_type, w_type = ctx.types
        d_weights = torch.empty_like(d_weights_N).scatter_(0, plan.slot_N, d_weights_N).to(weights_type)
        d_x_TD = _sum_rows(d_x_ND, plan.row_TK)
        return d_x_TD, d_weights, None, d_w1.to(w_type), d_w2.to(w_type), d_w3.to(w_type)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right, written to `out` and returned in the type it was computed in."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    result = left @ right
    out.copy_(result)
    return result


def _expert_rows(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Every expert that has rows, with them."""
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(begin, begin + count)
        begin += count


def _sum_rows(x_ND: Tensor, row_TK: Tensor) -> Tensor:
    """Each token's sum of its rows, [T, D]."""
    num_tokens, top_k = row_TK.shape
    if top_k == 1:
        return x_ND.index_select(0, row_TK.flatten())
    if x_ND.device.type == "cpu":
        # The one kernel that gathers and sums at once, and adds up in fp32.
        starts = torch.arange(0, num_tokens * top_k, top_k)
        return torch.embedding_bag(x_ND, row_TK.flatten(), starts, False, 0)[0]
    return x_ND.index_select(0, row_TK.flatten()).view(num_tokens, top_k, -1).sum(dim=1)
