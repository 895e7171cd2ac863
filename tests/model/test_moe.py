"""The MoE layer against a sum written out per token, and the initial weights."""

import math

import torch
import torch.nn.functional as F

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.init import initialize
from lumina_ds.model.moe import MoE
from lumina_ds.model.transformer import CausalLM

CONFIG = ModelConfig(
    vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, num_shared_experts=2,
)  # fmt: skip


def test_output_is_the_weighted_sum_of_each_tokens_experts():
    layer = MoE(CONFIG)
    for number, parameter in enumerate(layer.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(9))
    expected = torch.zeros_like(x)
    for row in range(2):
        for token in range(7):
            h = x[row, token]
            scores = (layer.router.weight @ h).softmax(0)
            best = scores.topk(2)
            for weight, expert in zip(best.values / best.values.sum(), best.indices, strict=True):
                w1, w2, w3 = (getattr(layer.experts, name)[expert] for name in ("w1", "w2", "w3"))
                expected[row, token] += weight * (w2 @ (F.silu(w1 @ h) * (w3 @ h)))
    torch.testing.assert_close(layer(x) - layer.shared_experts(x), expected, rtol=1e-5, atol=1e-6)


def test_initialisation_is_the_seed_alone_and_scales_residual_outputs():
    config = CONFIG.model_copy(update={"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 64})
    first, second = CausalLM(config), CausalLM(config)
    initialize(first, config, seed=5)
    torch.manual_seed(99)
    initialize(second, config, seed=5)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    experts = first.model.layers[0].mlp.experts
    assert math.isclose(experts.w1.std().item(), 0.02, rel_tol=0.05)
    assert math.isclose(experts.w2.std().item(), 0.02 / 2, rel_tol=0.05)  # 1/sqrt(2 * 2 layers)
    initialize(second, config, seed=6)
    assert not torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
