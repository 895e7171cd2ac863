"""Mixture-of-experts layer: the router (router.py), the grouped experts, and a plain forward that is the reference.

The module tree equals what DeepSpeed's AutoEP builds (`router.gate`, `experts.w1|w2|w3`), so one set of
parameter names serves training, checkpoints and inference. Under AutoEP the layer's forward is
DeepSpeed's, with our Router class swapped in (engine/deepspeed/expert_parallel.py).
"""

from __future__ import annotations

from torch import Tensor, nn

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.experts import Experts
from lumina_ds.model.feed_forward import SwiGLU
from lumina_ds.model.kernels import PLAIN, Kernels
from lumina_ds.model.router import Router


class MoE(nn.Module):
    """Routed experts plus optional shared ones: [B, S, D] to [B, S, D]."""

    def __init__(self, config: ModelConfig, layer: int = 0, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.router = Router(config, layer)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.num_shared_experts * config.moe_intermediate_size, kernels.swiglu)
            if config.num_shared_experts
            else None
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        weights_TK, indices_TK, counts_E = self.router(x_TD)
        out_TD = self.experts(x_TD, counts_E, weights_TK, indices_TK)
        out_BSD = out_TD.view_as(x_BSD)
        return out_BSD if self.shared_experts is None else out_BSD + self.shared_experts(x_BSD)
