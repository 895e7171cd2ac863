"""Mixture-of-experts layer: the router (router.py), the grouped experts, and a plain forward that is the reference.

The module tree equals what DeepSpeed's AutoEP builds (`router.gate`, `experts.w1|w2|w3`), so one set of
parameter names serves training, checkpoints and inference. Under AutoEP the layer's forward is
DeepSpeed's, with our Router class swapped in (engine/expert_parallel.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.feed_forward import SwiGLU
from lumina_ds.model.router import Router


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

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.router = Router(config, layer)
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
