"""What a rank allocates and draws, without ranks: storage by element, values by position."""

import torch

from lumina_ds.config.schema import ModelConfig
from lumina_ds.engine.allocate import allocate
from lumina_ds.engine.deepspeed.meta_parameters import without_storage
from lumina_ds.model import init
from lumina_ds.model.init import initial_values
from lumina_ds.model.transformer import CausalLM

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    num_experts=4, moe_intermediate_size=24, tie_word_embeddings=True,
)  # fmt: skip


def test_nothing_is_stored_before_and_experts_are_not_stored_after():
    with without_storage():
        model = CausalLM(CONFIG)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    allocate(model, torch.bfloat16, torch.device("cpu"), {"zero_optimization": {"stage": 2}})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = {name: parameter.untyped_storage().nbytes() for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert stored["model.layers.0.mlp.experts.w1"] == 2
    assert stored["model.layers.1.self_attn.q_proj.weight"] == 2 * 16 * 16
    assert torch.nn.Linear(2, 3).weight.device.type == "cpu"  # the context left nothing behind


def test_buffers_keep_their_values():
    class Buffered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(3.0))
            self.weight = torch.nn.Parameter(torch.ones(2, 2))

    with without_storage():
        model = Buffered()
    allocate(model, torch.float32, torch.device("cpu"), {"zero_optimization": {"stage": 0}})
    assert model.table.tolist() == [0.0, 1.0, 2.0] and model.weight.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_a_part_is_drawn_as_in_the_whole(monkeypatch):
    monkeypatch.setattr(init, "_BLOCK", 100)
    name, shape = "model.layers.0.mlp.experts.w2", (4, 16, 24)
    whole = initial_values(name, shape, CONFIG, 3, 0, 1536)
    for start, stop in ((0, 1), (99, 101), (100, 200), (768, 1536), (1500, 1536), (5, 5)):
        assert torch.equal(initial_values(name, shape, CONFIG, 3, start, stop), whole[start:stop])
    assert abs(whole.std().item() - 0.02 / 2) < 5e-4  # 1/sqrt(2 * 2 layers)
    assert len(set(whole.tolist())) > 1500  # blocks do not repeat one another
    other = initial_values(name.replace("0", "1"), shape, CONFIG, 3, 0, 1536)
    assert not torch.equal(other, whole)
    assert initial_values("model.norm.weight", (16,), CONFIG, 3, 4, 8).tolist() == [1.0] * 4
