"""Floating-point operations of training, per token."""

from __future__ import annotations

from collections.abc import Mapping

from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.config.tensors import cached_by_model
from lumina_ds.plan.activations import recomputed_layers
from lumina_ds.plan.parameters import count_parameters

_RECOMPUTED_PARTS = {
    "none": (),
    "full": ("attention projections", "attention scores", "dense feed-forward", "router", "experts"),
    "attention": ("attention projections", "attention scores"),
    "experts": ("dense feed-forward", "router", "experts"),
}


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """FLOPs of forward and backward for one token of a row of `seq_length` that is one document.

    2 per weight and token forward and 4 backward (Kaplan et al., arXiv 2001.08361) over the weights that a
    token multiplies: no embedding look-up, no norms, only its top-k experts; the head also when tied.
    Attention adds two products of width heads x head_dim with the (seq_length + 1) / 2 tokens that a causal
    one sees on average. Activation checkpointing repeats the forward third of it; that is not counted, as
    usual for MFU.
    """
    return sum(flops_by_part(model, seq_length).values())


@cached_by_model
def flops_by_part(model: ModelConfig, seq_length: int) -> dict[str, int]:
    """The same, split into the parts of the model; `experts` are the top-k that a token visits."""
    counts = count_parameters(model)
    visited = counts.experts // model.num_experts * model.num_experts_per_tok if model.num_experts else 0
    attention_width = model.num_attention_heads * model.attention_head_dim
    return {
        "attention projections": 6 * counts.attention,
        "attention scores": 3 * 2 * attention_width * (seq_length + 1) * model.num_hidden_layers,
        "dense feed-forward": 6 * (counts.dense_feed_forward + counts.shared_experts),
        "router": 6 * counts.router,
        "experts": 6 * visited,
        "head": 6 * model.vocab_size * model.hidden_size,
    }


def performed_flops_per_token(config: RunConfig) -> float:
    """What one token really takes: the counted FLOPs, and those that activation checkpointing repeats."""
    flops = flops_by_part(config.model, config.seq_length)
    return sum(flops.values()) + _recomputed_flops(config, flops)


def _recomputed_flops(config: RunConfig, flops: Mapping[str, int]) -> float:
    """Recomputing repeats the forward pass, a third of the counted work, of its parts of its blocks; never the head."""
    mode = config.train.activation_checkpointing
    layers = recomputed_layers(config.model, mode, config.train.checkpoint_interval)
    share = len(layers) / config.model.num_hidden_layers
    return share * sum(flops[part] for part in _RECOMPUTED_PARTS[mode]) / 3
