"""Counted parameters: by hand for debug, and tensor by tensor against the real model."""

from __future__ import annotations

import random

import pytest

from lumina_ds.config.load import load_config, preset_names
from lumina_ds.config.schema import ModelConfig
from lumina_ds.config.tensors import parameter_tensors
from lumina_ds.plan.flops import flops_per_token
from lumina_ds.plan.parameters import count_parameters


def meta_tensors(model):
    torch = pytest.importorskip("torch")
    from lumina_ds.model.transformer import CausalLM

    with torch.device("meta"):
        built = CausalLM(model)
    return [(name, tuple(parameter.shape)) for name, parameter in built.named_parameters()]


def planned_tensors(model):
    return [(tensor.name, tensor.shape) for tensor in parameter_tensors(model)]


def test_debug_by_hand():
    counts = count_parameters(load_config("debug").config.model)
    # Per layer: q and o 128 x 128, k and v 64 x 128 (one KV head of 64).
    assert counts.attention == 2 * (2 * 128 * 128 + 2 * 64 * 128) == 98_304
    # 2 layers x 4 experts x 3 matrices of 128 x 88.
    assert counts.experts == 2 * 4 * 3 * 128 * 88 == 270_336
    assert counts.router == 2 * 4 * 128
    assert counts.embedding == 1024 * 128
    assert counts.norm == (2 * 2 + 1) * 128
    assert (counts.head, counts.shared_experts, counts.dense_feed_forward) == (0, 0, 0)
    assert counts.total == 131_072 + 98_304 + 270_336 + 1_024 + 640 == 501_376
    # Two of four experts.
    assert counts.active == 501_376 - 135_168
    assert counts.bf16_bytes == 1_002_752


def test_parts_of_a_mixed_model_by_hand():
    model = ModelConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        first_k_dense_layers=1,
        intermediate_size=5,
        num_experts=3,
        num_experts_per_tok=1,
        moe_intermediate_size=4,
        num_shared_experts=2,
        qk_norm=True,
    )
    counts = count_parameters(model)
    assert counts.attention == 2 * (12 * 8 + 6 * 8 + 6 * 8 + 8 * 12)
    assert counts.dense_feed_forward == 3 * 8 * 5
    assert counts.experts == 3 * 3 * 8 * 4
    assert counts.shared_experts == 3 * 8 * (2 * 4)
    assert counts.router == 3 * 8
    assert counts.norm == 2 * (8 + 8 + 6 + 6) + 8
    assert counts.head == counts.embedding == 80
    assert counts.total - counts.active == 2 * 3 * 8 * 4


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_equals_the_model(name):
    model = load_config(name).config.model
    assert planned_tensors(model) == meta_tensors(model)


def test_two_hundred_random_models_equal_the_model():
    draw = random.Random(0)
    for _ in range(200):
        model = random_model(draw)
        assert planned_tensors(model) == meta_tensors(model), model
        assert count_parameters(model).total == sum(tensor.numel for tensor in parameter_tensors(model))


def random_model(draw):
    kv_heads = draw.randint(1, 4)
    heads = kv_heads * draw.randint(1, 4)
    layers = draw.randint(1, 5)
    return ModelConfig(
        vocab_size=draw.randint(8, 300),
        hidden_size=heads * 2 * draw.randint(4, 10),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=draw.choice([None, 2 * draw.randint(1, 20)]),
        intermediate_size=draw.randint(1, 99),
        num_experts=draw.choice([0, draw.randint(2, 9)]),
        num_experts_per_tok=draw.randint(1, 2),
        moe_intermediate_size=draw.randint(1, 50),
        num_shared_experts=draw.choice([0, 1, 3]),
        first_k_dense_layers=draw.randint(0, layers),
        qk_norm=draw.random() < 0.5,
        tie_word_embeddings=draw.random() < 0.5,
    )


def test_flops_of_debug_by_hand():
    # Multiplied weights: active less norms; the tied embedding serves as the head.
    multiplied = 366_208 - 640
    # Two products of width 128 with 128.5 tokens on average, 2 FLOPs each, in 2 layers; times 3 for training.
    attention = 2 * (2 * 2 * 128 * 128.5)
    assert flops_per_token(load_config("debug").config.model, 256) == 6 * multiplied + 3 * attention == 2_588_160


def test_flops_leave_the_untied_embedding_out():
    model = ModelConfig(vocab_size=100, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        num_key_value_heads=1, intermediate_size=16)  # fmt: skip
    weights = 4 * 8 * 8 + 3 * 8 * 16 + 100 * 8
    assert flops_per_token(model, 1) == 6 * weights + 3 * (2 * 8 * 2)
