"""The memory plan: activations against what autograd saves, and the phases put together by hand."""

from __future__ import annotations

import json

import pytest

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.schema import ModelConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan import plan_memory
from lumina_ds.plan.activations import activation_bytes
from lumina_ds.plan.hardware import cards, cards_that_fit, usable_bytes
from lumina_ds.plan.memory import COMPONENTS, PHASES
from lumina_ds.plan.shape import Shape
from lumina_ds.text import GIB

DENSE = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=700,
)


def config(*overrides, preset="debug"):
    return load_config(preset, [Override(field, value, field) for field, value in overrides]).config


def test_activations_of_a_tiny_dense_block_by_hand():
    model = ModelConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
    )
    found = activation_bytes(model, Shape(tokens=1, precision="fp32"))
    # Input 8, q 8, output 8, its copy 8, k 4, v 4, in fp32; the log-sum-exp of two heads.
    assert found.attention == 4 * (8 + 3 * 8 + 2 * 4) + 4 * 2
    # Input 8; gate, up, silu and product of 12.
    assert found.feed_forward == 4 * (8 + 4 * 12)
    # Three norms of 8 * 8 + 4, the head's input, cosines and sines.
    assert found.other == 3 * (8 * 8 + 4) + 4 * 8 + 8 * 4
    # The residual stream's, and of gate, up and product, while the product is let go.
    assert found.layers[0].feed_forward_gradients == 4 * (8 + 2 * 12)
    # The trained position and its gradient; one chunk: fp32 logits and log-probabilities of a token are less than
    # its gradient and that of the 10 x 8 weight.
    assert found.loss == 2 * 4 * 8 + 4 * 10 + 4 * 10 * 8


def test_activations_of_an_expert_layer_by_hand():
    model = ModelConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        moe_intermediate_size=6,
    )
    found = activation_bytes(model, Shape(10, "bf16"))
    # Router input in fp32, scores, two outputs of 8; 20 rows and 8 of padding for each of four experts.
    assert found.feed_forward == 10 * (4 * 8 + 22 * 4 + 2 * 2 * 8) + (20 + 32) * 2 * (8 + 4 * 6)
    shared = activation_bytes(model, Shape(10, "bf16", expert_parallel_size=2))
    # The fullest of two ranks: a quarter more rows, half the experts' padding.
    assert shared.feed_forward == 10 * (4 * 8 + 22 * 4 + 2 * 2 * 8) + (25 + 16) * 2 * (8 + 4 * 6)
    assert shared.layers[0].expert_dispatch == (25 + 16) * 2 * 8
    # Ours on a CPU: scores, a choice's places, the rows and two projections of each.
    local = activation_bytes(model, Shape(10, "bf16", device="cpu"))
    assert local.feed_forward == 10 * (4 * 8 + 8 * 4 + 16 + 2 * 47) + 20 * 2 * (8 + 2 * 6)


def test_checkpointing_keeps_inputs_and_one_block():
    whole = activation_bytes(DENSE, Shape(100, "bf16"))
    kept = activation_bytes(DENSE, Shape(100, "bf16", "full"))
    assert (kept.attention, kept.feed_forward) == (0, 0)
    norm = 8 * 256 + 4
    assert kept.layers[0].made_feed_forward == whole.attention // 4 + whole.feed_forward // 4 + 100 * 2 * norm
    # And the state of the random numbers, 5056 bytes a block.
    assert whole.other - kept.other == 100 * (2 * norm * 4 - 4 * 2 * 256) - 4 * 5056
    # In fp32 the block's input is the first norm's.
    low = activation_bytes(DENSE, Shape(100, "fp32", "attention")).layers[0]
    assert low.made_attention == low.attention + low.norm - 100 * 4 * 256


def test_phases_of_debug_by_hand():
    plan = plan_memory(config(), 2, "fp32", "cpu")
    assert (plan.zero_stage, plan.world_size, plan.seq_length, plan.micro_batch_size) == (1, 2, 256, 8)
    forward, backward, step = (plan.phases[phase] for phase in PHASES)
    # decay 230,400, no_decay 640, experts 270,336: all multiples of 4, so nothing is padded.
    assert forward["parameters"] == 4 * 501_376
    assert forward["master weights"] == 4 * 501_376 // 2
    assert forward["moments"] == 8 * 501_376 // 2
    # The backward pass is highest where it begins, with every activation, the empty bucket, and of gradients only the
    # tied head's, which waits for the embedding's.
    assert (forward["gradients"], backward["gradients"]) == (0, 4 * 1024 * 128)
    assert plan.peaks["backward"].label == "backward of the feed-forward of block 1"
    assert (forward["buckets"], backward["buckets"], step["buckets"]) == (0, 4 * 501_376, 0)
    # All 2048 tokens in one chunk: logits and log-probabilities, the hidden states trained and their gradient.
    assert forward["logits and loss"] == 8 * 1024 * 2048 + 2 * 4 * 128 * 2048
    assert plan.peaks["forward"].label == "head and loss"
    assert backward["logits and loss"] == step["logits and loss"] == 0
    assert step["step temporaries"] == 4 * 270_336 // 2
    assert step["activations: attention"] == 0
    assert forward["CUDA context and NCCL"] == 0
    assert plan.peak_phase == "forward"
    assert plan.peak_bytes == sum(plan.breakdown.values())
    others = sum(size for name, size in forward.items() if name != "margin")
    assert forward["margin"] == round(0.05 * others)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_names_every_component(stage):
    plan = plan_memory(config(("deepspeed.zero_stage", stage)), 2, "fp32")
    for phase in PHASES:
        assert tuple(plan.phases[phase]) == COMPONENTS
        assert all(isinstance(size, int) and size >= 0 for size in plan.phases[phase].values())


def test_higher_stages_of_a_large_model_take_less():
    peaks = [
        plan_memory(config(("deepspeed.zero_stage", stage), preset="b7"), 8, "bf16").peak_bytes for stage in (1, 2, 3)
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_expert_parallelism_divides_the_experts():
    alone = plan_memory(config(preset="b7"), 8, "bf16")
    shared = plan_memory(config(("deepspeed.expert_parallel_size", 8), preset="b7"), 8, "bf16")
    experts = alone.parameters.experts
    saved = alone.breakdown["parameters"] - shared.breakdown["parameters"]
    assert saved == 2 * experts * 7 // 8
    assert shared.breakdown["all-to-all buffers"] > 0


def test_autocast_keeps_bf16_copies_of_what_it_casts():
    plan = plan_memory(config(), 1, "mixed_bf16")
    # Attention and the experts: 2 layers x 4 experts x 3 matrices of 88 x 128. The head's copy comes and goes in the loss.
    assert plan.phases["forward"]["gathered parameters"] == 2 * (98_304 + 270_336)


def test_offload_moves_states_to_the_host():
    offloaded = plan_memory(config(("deepspeed.config", "zero2_offload")), 2, "fp32")
    assert offloaded.host_bytes > 0
    assert offloaded.breakdown["master weights"] == offloaded.breakdown["moments"] == 0
    on_cpu = plan_memory(config(("deepspeed.config", "zero2_offload")), 2, "fp32", "cpu")
    assert on_cpu.breakdown["offloaded states"] == on_cpu.host_bytes


def test_a_composed_json_is_taken_as_it_is():
    run = config()
    composed = compose_deepspeed(run, 2, "fp32")
    assert plan_memory(run, 2, "fp32", deepspeed_json=composed) == plan_memory(run, 2, "fp32")
    composed["zero_optimization"] |= {"stage": 2, "contiguous_gradients": True, "reduce_bucket_size": 1_000_000}
    plan = plan_memory(run, 2, "fp32", deepspeed_json=composed)
    assert (plan.zero_stage, plan.phases["backward"]["buckets"]) == (2, 4_000_000)


def test_refused_layouts():
    with pytest.raises(ConfigError, match="13 ranks are not divisible by --expert-parallel 8; use 8 or 16 ranks"):
        plan_memory(config(("deepspeed.expert_parallel_size", 8), preset="b7"), 13, "bf16")
    with pytest.raises(ConfigError, match="precision 'auto' cannot be planned"):
        plan_memory(config(), 1, "auto")


def test_cards():
    sizes = [card.memory_gb for card in cards()]
    assert sizes == [16, 24, 32, 40, 48, 64, 80, 94, 96, 141, 186, 192, 256, 288]
    assert [card.memory_gb for card in cards_that_fit(int(44.3 * GIB))] == [48, 64, 80, 94, 96, 141, 186, 192, 256, 288]
    assert [card.memory_gb for card in cards_that_fit(int(44.4 * GIB))] == [64, 80, 94, 96, 141, 186, 192, 256, 288]
    assert cards_that_fit(1 << 50) == []
    assert usable_bytes(80) == int(79.1 * GIB)
    assert usable_bytes(100) == int(92 * GIB)


def test_the_plan_is_plain_data():
    plan = plan_memory(config(), 2, "fp32")
    assert json.loads(json.dumps(plan.phases)) == {phase: dict(plan.phases[phase]) for phase in PHASES}
