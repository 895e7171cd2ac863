"""The shipped presets: the exact list and shapes, sizes near their names, sensible training settings."""

from __future__ import annotations

import re

import pytest

from lumina_ds.config.load import load_config, preset_names
from lumina_ds.plan.parameters import count_parameters

# hidden, layers, heads, KV heads, context, experts, and the parameters the name promises.
SHAPES = {
    "debug": (128, 2, 2, 1, 256, 4, 0.5e6),
    "m70_memory": (512, 10, 8, 2, 1024, 8, 70e6),
    "m120_speed": (768, 8, 12, 4, 1024, 8, 120e6),
    "b1": (1024, 12, 16, 4, 2048, 8, 1e9),
    "b3_inference": (2560, 24, 20, 10, 2048, 16, 3e9),
    "b6_quality": (3200, 32, 25, 5, 4096, 32, 6e9),
    "b7": (2048, 22, 16, 8, 4096, 16, 7e9),
    "b14": (2560, 28, 20, 10, 4096, 32, 14e9),
    "b50": (5120, 40, 40, 10, 4096, 64, 50e9),
    "b100": (7168, 48, 56, 14, 8192, 96, 100e9),
    "b200": (8192, 56, 64, 16, 8192, 128, 200e9),
    "b300": (9216, 64, 72, 18, 8192, 144, 300e9),
}


def test_the_published_presets_are_there():
    assert set(SHAPES) <= set(preset_names())


def promised(name):
    """Parameters by the name: b7 has 7 billion, m70_memory 70 million; of another name the shape's, or None."""
    size = re.fullmatch(r"([bm])([0-9]+)(_[a-z]+)?", name)
    return int(size[2]) * {"b": 10**9, "m": 10**6}[size[1]] if size else SHAPES.get(name, (None,))[-1]


@pytest.mark.parametrize("name", SHAPES)
def test_shape_is_the_published_one(name):
    model = load_config(name).config.model
    shape = (
        model.hidden_size,
        model.num_hidden_layers,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.max_position_embeddings,
        model.num_experts,
    )
    assert shape == SHAPES[name][:-1]
    assert model.num_experts_per_tok == 2


@pytest.mark.parametrize("name", [name for name in preset_names() if promised(name)])
def test_total_is_within_one_percent_of_the_name(name):
    total = count_parameters(load_config(name).config.model).total
    assert abs(total / promised(name) - 1) < 0.01


def test_names_promise_what_was_published():
    assert {name: promised(name) for name in SHAPES} == {name: shape[-1] for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", preset_names())
def test_carries_its_own_training_settings(name):
    resolved = load_config(name)
    for field in (
        "description",
        "train.learning_rate",
        "train.warmup_ratio",
        "train.micro_batch_size",
        "train.gradient_accumulation_steps",
        "train.activation_checkpointing",
        "model.capacity_factor",
        "model.router_aux_loss_coef",
        "model.rope_theta",
        "deepspeed.zero_stage",
        "deepspeed.expert_parallel_size",
    ):
        assert resolved.origins[field] == f"preset {name}", field
    config = resolved.config
    assert 1e-5 < config.train.learning_rate < 1e-2
    assert 0.005 <= config.model.router_aux_loss_coef <= 0.035
    assert config.deepspeed.expert_parallel_size == 1
    assert "\n" not in config.description


def test_capacity_grows_with_the_experts():
    models = sorted((load_config(name).config.model for name in SHAPES), key=lambda model: model.num_experts)
    factors = [model.capacity_factor for model in models]
    assert factors == sorted(factors)
    assert (factors[0], factors[-1]) == (1.1, 2.8)


def test_large_presets_shard_and_recompute():
    for name in ("b50", "b100", "b200", "b300"):
        config = load_config(name).config
        assert config.deepspeed.zero_stage == 3
        assert config.train.activation_checkpointing == "full"
    assert load_config("debug").config.deepspeed.zero_stage is None
