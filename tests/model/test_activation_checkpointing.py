"""Recomputing changes neither loss nor gradients, router losses and counts included, and does recompute."""

import pytest
import torch

from lumina_ds.config.schema import ModelConfig, TrainConfig
from lumina_ds.model.attention_backends import DocumentLayout
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, num_experts=4, moe_intermediate_size=24, num_shared_experts=1,
    first_k_dense_layers=1, intermediate_size=40, initializer_range=0.3,
)  # fmt: skip


def run(mode, interval=1):
    """Everything that a step measures, and how often each block's halves ran."""
    model = CausalLM(CONFIG, activation_checkpointing=mode, checkpoint_interval=interval)
    initialize(model, CONFIG, seed=3)
    calls = {"self_attn": [0, 0, 0], "mlp": [0, 0, 0]}
    for layer, block in enumerate(model.model.layers):
        for name, counts in calls.items():

            def count(*_, layer=layer, counts=counts):
                counts[layer] += 1

            getattr(block, name).register_forward_pre_hook(count)
    ids = torch.arange(24).view(1, 24) % 64
    documents = DocumentLayout.from_lengths((6, 4, 9, 5))
    padding = torch.arange(24).view(1, 24) < 19
    loss, balance, z_loss, counts = model(ids, None, documents, labels=ids.roll(-1, 1), padding_mask=padding)
    (loss + balance + z_loss).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss, "balance": balance, "z_loss": z_loss, "counts": counts} | gradients, calls


@pytest.mark.parametrize(
    "mode, interval, attention, feed_forward",
    [
        ("none", 1, [1, 1, 1], [1, 1, 1]),
        ("full", 1, [2, 2, 2], [2, 2, 2]),
        ("attention", 1, [2, 2, 2], [1, 1, 1]),
        ("experts", 1, [1, 1, 1], [2, 2, 2]),
        ("full", 2, [2, 1, 2], [2, 1, 2]),
        ("experts", 3, [1, 1, 1], [2, 1, 1]),
    ],
)
def test_every_mode_trains_alike(mode, interval, attention, feed_forward):
    expected, _ = run("none")
    found, calls = run(mode, interval)
    assert calls == {"self_attn": attention, "mlp": feed_forward}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_off_is_another_word_for_none():
    assert TrainConfig(activation_checkpointing="off").activation_checkpointing == "none"


@pytest.mark.parametrize("mode", ["full", "experts"])
def test_nothing_recomputed_outlives_its_block(mode):
    """Recomputation stops in the middle of a block, where a router's measurements would hold all of it."""
    model = CausalLM(CONFIG, activation_checkpointing=mode)
    initialize(model, CONFIG, seed=3)
    ids = torch.arange(24).view(1, 24) % 64
    sum(model(ids, None, DocumentLayout.from_lengths((24,)), labels=ids)[:3]).backward()
    assert [block.mlp.router.statistics for block in model.model.layers if block.is_moe] == [None, None]
