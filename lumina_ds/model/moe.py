"""Mixture-of-experts layer: the router, the grouped experts, and a plain forward that is the reference.

The module tree equals what DeepSpeed's AutoEP builds (`router.gate`, `experts.w1|w2|w3`), so one set of
parameter names serves training, checkpoints and inference. Under AutoEP the layer's forward is
DeepSpeed's, with this module's Router class swapped in (engine/expert_parallel.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.feed_forward import SwiGLU


@dataclass
class RouterStatistics:
    """What one forward pass of one router leaves behind; scalars in fp32.

    `load_balancing_loss` is 1 when balanced, up to E when one expert takes all; `z_loss` the mean
    squared log-sum-exp; `tokens_per_expert` [E] counts assignments of real tokens.
    """

    load_balancing_loss: Tensor
    z_loss: Tensor
    tokens_per_expert: Tensor


class RouterGate(nn.Linear):
    """The routing matrix [E, D], multiplied in fp32: bf16 logits tie and flip the choice of experts."""

    def forward(self, x: Tensor) -> Tensor:
        # Autocast would turn the product back into bf16.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Router(nn.Module):
    """Top-k choice by softmax scores, dropless: every token reaches its k experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = RouterGate(config.hidden_size, config.num_experts, bias=False)
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.token_mask: Tensor | None = None
        self.statistics: RouterStatistics | None = None

    @property
    def weight(self) -> Tensor:
        """The gate's weight, under the name by which AutoEP looks for it."""
        return self.gate.weight

    def forward(self, x_TD: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, top_k] in fp32, expert indices [T, top_k], and assignments per expert [E] in int32.

        `expert_bias` [E], if given, shifts the choice but not the weights (DeepSeek-V3). The contract is that
        of deepspeed/moe/ep_router.py, TokenChoiceTopKRouter.
        """
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        choice_TE = scores_TE if expert_bias is None else scores_TE + expert_bias
        indices_TK = choice_TE.topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, indices_TK)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        self.statistics = router_statistics(logits_TE, scores_TE, indices_TK, self.token_mask)
        return weights_TK, indices_TK, count_assignments(indices_TK, logits_TE.shape[1])


def count_assignments(indices_TK: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, int32 [E]."""
    flat = indices_TK.reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


def router_statistics(
    logits_TE: Tensor, scores_TE: Tensor, indices_TK: Tensor, token_mask: Tensor | None
) -> RouterStatistics:
    """Load-balancing loss (Switch, arXiv 2101.03961, eq. 4, with shares over T*k assignments) and router
    z-loss (ST-MoE, arXiv 2202.08906, eq. 5), over the tokens that `token_mask` [T] marks as real."""
    num_experts, top_k = logits_TE.shape[1], indices_TK.shape[1]
    real_T = torch.ones(len(logits_TE), device=logits_TE.device) if token_mask is None else token_mask.float()
    num_tokens = real_T.sum().clamp(min=1)
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.float32).scatter_(1, indices_TK, 1.0)
    tokens_per_expert = real_T @ chosen_TE
    mean_score_E = (real_T @ scores_TE) / num_tokens
    balance = num_experts * (tokens_per_expert / (num_tokens * top_k) * mean_score_E).sum()
    z_loss = (real_T * logits_TE.logsumexp(dim=-1).square()).sum() / num_tokens
    return RouterStatistics(balance, z_loss, tokens_per_expert)


class Experts(nn.Module):
    """E SwiGLU experts as three tensors: w1 (gate) and w3 (up) [E, F, D], w2 (down) [E, D, F]."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.w3 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """[N, D] to [N, D], where rows are sorted by expert and `counts_E` says how many each has."""
        # unbind: its backward stacks the gradients once; w[e] would write a full [E, ...] zero tensor per expert.
        experts = zip(self.w1.unbind(), self.w2.unbind(), self.w3.unbind(), strict=True)
        outputs = [
            F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
            for x, (w1, w2, w3) in zip(x_ND.split(counts_E.tolist()), experts, strict=True)
        ]
        return torch.cat(outputs)


class MoE(nn.Module):
    """Routed experts plus optional shared ones: [B, S, D] to [B, S, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.router = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.num_shared_experts * config.moe_intermediate_size)
            if config.num_shared_experts
            else None
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        weights_TK, indices_TK, counts_E = self.router(x_TD)
        top_k = indices_TK.shape[1]
        order_N = indices_TK.flatten().argsort(stable=True)
        routed_ND = self.experts(x_TD[order_N // top_k], counts_E)
        # Back to token order, then the weighted sum in fp32.
        slots_ND = torch.empty_like(routed_ND).index_copy(0, order_N, routed_ND)
        out_TD = (slots_ND.view(-1, top_k, x_TD.shape[1]) * weights_TK.unsqueeze(-1)).sum(dim=1).to(x_BSD.dtype)
        out_BSD = out_TD.view_as(x_BSD)
        return out_BSD if self.shared_experts is None else out_BSD + self.shared_experts(x_BSD)
