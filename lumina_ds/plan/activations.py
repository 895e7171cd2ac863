"""Bytes that a forward pass leaves for the backward pass on one rank, by part of the model.

Counted from the tensors that autograd saves in `lumina_ds.model` and in AutoEP's layer. d hidden width,
H query and K key/value heads of width c, f feed-forward width, E experts, k top-k, T tokens of a
micro-batch, b bytes of a matrix product's operand, r bytes of the residual stream. The experts' input is
cast to b (model/transformer.py), which autocast alone would not do.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumina_ds.config.schema import ModelConfig

# Routing is dropless: with experts on several ranks the fullest rank gets more than an even share.
EXPERT_LOAD_IMBALANCE = 1.25
# deepspeed/moe/ep_kernels.py aligns every expert's rows for the grouped product.
_ROW_ALIGNMENT = 8
_OPERAND_BYTES = {"fp32": 4, "mixed_bf16": 2, "bf16": 2, "fp16": 2}
_RESIDUAL_BYTES = {"fp32": 4, "mixed_bf16": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class ActivationBytes:
    """`workspace` are the gradients inside one block's backward; `logits` the peak of head and loss."""

    attention: int
    feed_forward: int
    other: int
    workspace: int
    logits: int
    all_to_all: int


def activation_bytes(
    model: ModelConfig, tokens: int, precision: str, checkpointing: bool, expert_parallel_size: int
) -> ActivationBytes:
    """Bytes for `tokens` tokens of one micro-batch; `checkpointing` keeps block inputs and one block at a time."""
    b, r = _OPERAND_BYTES[precision], _RESIDUAL_BYTES[precision]
    d, layers = model.hidden_size, range(model.num_hidden_layers)
    spread = EXPERT_LOAD_IMBALANCE if expert_parallel_size > 1 else 1.0
    rows = spread * tokens * model.num_experts_per_tok + _ROW_ALIGNMENT * (model.num_experts // expert_parallel_size)
    feed_forward = [
        _mixture(model, tokens, rows, b) if model.is_moe_layer(layer) else _dense(model, tokens, b) for layer in layers
    ]
    # Norm before the head and the head's operand; the embedding's output is the first residual.
    other = _norm(d) + b * d + r * d
    if checkpointing:
        attention_kept, feed_forward_kept = _attention(model, b), max(feed_forward)
        other += r * d * len(layers) + 2 * _norm(d)
    else:
        attention_kept, feed_forward_kept = _attention(model, b) * len(layers), sum(feed_forward)
        other += 2 * _norm(d) * len(layers)
    width = max(_feed_forward_width(model, layer) for layer in layers)
    return ActivationBytes(
        attention=tokens * attention_kept,
        feed_forward=round(feed_forward_kept),
        other=tokens * other,
        workspace=tokens * b * (2 * width + d),
        logits=_logits(model, tokens),
        all_to_all=round(_all_to_all(model, tokens, spread, b)) if expert_parallel_size > 1 else 0,
    )


def _norm(width: int) -> int:
    """RMSNorm in fp32 (model/feed_forward.py): input 4, normalized 4 per element, the root's inverse 4 a row.
    A fused CUDA kernel saves less; this is the bound."""
    return 8 * width + 4


def _attention(model: ModelConfig, b: int) -> int:
    """Input, q, k, v, output and its packed copy, and the log-sum-exp of a fused kernel: b (d + 3Hc + 2Kc) + 4H."""
    queries = model.num_attention_heads * model.attention_head_dim
    keys = model.num_key_value_heads * model.attention_head_dim
    heads = model.num_attention_heads + model.num_key_value_heads
    qk_norm = heads * _norm(model.attention_head_dim) if model.qk_norm else 0
    return b * (model.hidden_size + 3 * queries + 2 * keys) + 4 * model.num_attention_heads + qk_norm


def _dense(model: ModelConfig, tokens: int, b: int) -> float:
    """SwiGLU: input, gate, up, the gate's silu and their product, b (d + 4f)."""
    return tokens * b * (model.hidden_size + 4 * (model.intermediate_size or 0))


def _mixture(model: ModelConfig, tokens: int, rows: float, b: int) -> float:
    """The router's fp32 input 4d and about 22E of scores; k outputs of b d to weigh; SwiGLU over the routed
    `rows` of the fullest rank, b (d + 4f) each; shared experts as a dense layer."""
    d, width = model.hidden_size, model.moe_intermediate_size or 0
    routing = 4 * d + 22 * model.num_experts + b * model.num_experts_per_tok * d
    shared = b * (d + 4 * model.num_shared_experts * width) if model.num_shared_experts else 0
    return tokens * (routing + shared) + rows * b * (d + 4 * width)


def _feed_forward_width(model: ModelConfig, layer: int) -> int:
    """Hidden units that one token activates in a layer."""
    if not model.is_moe_layer(layer):
        return model.intermediate_size or 0
    return (model.num_experts_per_tok + model.num_shared_experts) * (model.moe_intermediate_size or 0)


def _logits(model: ModelConfig, tokens: int) -> int:
    """12 V T: model/loss.py casts to fp32 whatever the precision, and the backward of log-softmax holds its
    output, the incoming and the outgoing gradient. Every position counts as trained, the worst case."""
    return 12 * model.vocab_size * tokens


def _all_to_all(model: ModelConfig, tokens: int, spread: float, b: int) -> float:
    """Send and receive buffers of one exchange: k rows of width d out, the fullest rank's share in."""
    return (1 + spread) * tokens * model.num_experts_per_tok * b * model.hidden_size if model.num_experts else 0.0
