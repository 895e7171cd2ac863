"""Bytes that a forward pass leaves for the backward pass on one rank, by part of the model.

Counted from the tensors that autograd saves in `lumina_ds.model` and in AutoEP's layer. d hidden width,
H query and K key/value heads of width c, f feed-forward width, E experts, k top-k, T tokens of a
micro-batch, b bytes of a matrix product's operand, r bytes of the residual stream. The experts' input is
cast to b (model/transformer.py), which autocast alone would not do.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumina_ds.config.loss_chunk import loss_chunk_tokens
from lumina_ds.config.schema import ModelConfig

# Routing is dropless: with experts on several ranks the fullest rank gets more than an even share.
EXPERT_LOAD_IMBALANCE = 1.25
# deepspeed/moe/ep_kernels.py aligns every expert's rows for the grouped product.
_ROW_ALIGNMENT = 8
_OPERAND_BYTES = {"fp32": 4, "mixed_bf16": 2, "bf16": 2, "fp16": 2}
_RESIDUAL_BYTES = {"fp32": 4, "mixed_bf16": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class ActivationBytes:
    """`recomputed` is what one block's backward makes anew under checkpointing; `workspace` are the gradients inside
    one block's backward; `logits` the peak of head and loss."""

    attention: int
    feed_forward: int
    other: int
    recomputed: int
    workspace: int
    logits: int
    all_to_all: int


def activation_bytes(
    model: ModelConfig,
    tokens: int,
    precision: str,
    checkpointing: str,
    expert_parallel_size: int,
    interval: int = 1,
    loss_chunk: int | None = None,
    device: str = "cuda",
    fused_loss: bool = False,
) -> ActivationBytes:
    """Bytes for `tokens` tokens of one micro-batch on "cuda" or "cpu", where experts that are not spread keep less.

    `checkpointing` (none, full, attention, experts) keeps the inputs of what every `interval`-th block recomputes,
    and the contents of one such part at a time. `loss_chunk` is train.loss_chunk_tokens. With
    `fused_loss` the loss may be Liger's: which one it is shows at the start of the run, so the larger one counts.
    """
    b, r = _OPERAND_BYTES[precision], _RESIDUAL_BYTES[precision]
    d, layers = model.hidden_size, range(model.num_hidden_layers)
    spread = EXPERT_LOAD_IMBALANCE if expert_parallel_size > 1 else 1.0
    rows = spread * tokens * model.num_experts_per_tok + _ROW_ALIGNMENT * (model.num_experts // expert_parallel_size)
    local = device == "cpu" and expert_parallel_size == 1
    mixture = _mixture_on_cpu(model, tokens, b) if local else _mixture(model, tokens, rows, b)
    feed_forward = [mixture if model.is_moe_layer(layer) else _dense(model, tokens, b, cast=r > b) for layer in layers]
    anew = recomputed_layers(model, checkpointing, interval)
    attention_anew = anew if checkpointing in ("full", "attention") else []
    feed_forward_anew = anew if checkpointing in ("full", "experts") else []
    # Norm before the head and the head's operand; cosines and sines in fp32, which all layers share.
    other = _norm(d) + b * d + 8 * model.attention_head_dim
    for recomputed in (attention_anew, feed_forward_anew):
        other += _norm(d) * (len(layers) - len(recomputed))
    other += r * d * len(anew)
    kept = [size for layer, size in enumerate(feed_forward) if layer not in feed_forward_anew]
    attention = tokens * _attention(model, b, cast=r > b)
    made_anew = max((feed_forward[layer] + tokens * _norm(d) for layer in feed_forward_anew), default=0)
    made_anew += (attention + tokens * _norm(d)) * bool(attention_anew)
    logits = _logits(model, tokens, b, r, loss_chunk_tokens(loss_chunk, model.vocab_size))
    return ActivationBytes(
        attention=attention * (len(layers) - len(attention_anew)),
        feed_forward=round(sum(kept)),
        other=tokens * other,
        recomputed=round(made_anew),
        workspace=round(_workspace(model, tokens, b, local)),
        logits=max(logits, fused_loss_bytes(model, tokens, b)) if fused_loss else logits,
        all_to_all=round(_all_to_all(model, tokens, spread, b)) if expert_parallel_size > 1 else 0,
    )


def recomputed_layers(model: ModelConfig, checkpointing: str, interval: int) -> list[int]:
    """The blocks that activation checkpointing touches, as model/transformer.py picks them."""
    return [] if checkpointing == "none" else list(range(0, model.num_hidden_layers, interval))


def _norm(width: int) -> int:
    """RMSNorm in fp32 (model/feed_forward.py): input 4, normalized 4 per element, the root's inverse 4 a row.
    A fused CUDA kernel saves less; this is the bound."""
    return 8 * width + 4


def _attention(model: ModelConfig, b: int, cast: bool) -> int:
    """Input, q, k, v, output and its packed copy, and the log-sum-exp of a fused kernel: b (d + 3Hc + 2Kc) + 4H.

    Where autocast casts the input (`cast`), each of the three projections keeps a copy of its own.
    """
    queries = model.num_attention_heads * model.attention_head_dim
    keys = model.num_key_value_heads * model.attention_head_dim
    heads = model.num_attention_heads + model.num_key_value_heads
    qk_norm = heads * _norm(model.attention_head_dim) if model.qk_norm else 0
    return (
        b * ((3 if cast else 1) * model.hidden_size + 3 * queries + 2 * keys) + 4 * model.num_attention_heads + qk_norm
    )


def _dense(model: ModelConfig, tokens: int, b: int, cast: bool) -> float:
    """SwiGLU: input, gate, up, the gate's silu and their product, b (d + 4f); an input for gate and up each under
    autocast."""
    return tokens * b * ((2 if cast else 1) * model.hidden_size + 4 * (model.intermediate_size or 0))


def _mixture(model: ModelConfig, tokens: int, rows: float, b: int) -> float:
    """The router's fp32 input 4d and about 22E of scores; k outputs of b d to weigh; SwiGLU over the routed
    `rows` of the fullest rank, b (d + 4f) each; shared experts as a dense layer."""
    d, width = model.hidden_size, model.moe_intermediate_size or 0
    routing = 4 * d + 22 * model.num_experts + b * model.num_experts_per_tok * d
    shared = b * (d + 4 * model.num_shared_experts * width) if model.num_shared_experts else 0
    return tokens * (routing + shared) + rows * b * (d + 4 * width)


def _mixture_on_cpu(model: ModelConfig, tokens: int, b: int) -> float:
    """The same through model/experts.py, which computes silu and product again and weighs rows inside: b (d + 2f) a
    row; of the router its input 4d, scores and their logarithms 8E, and 40 bytes of places and weights a choice."""
    d, width, choices = model.hidden_size, model.moe_intermediate_size or 0, model.num_experts_per_tok
    routing = 4 * d + 8 * model.num_experts + 40 * choices
    shared = b * (d + 4 * model.num_shared_experts * width) if model.num_shared_experts else 0
    return tokens * (routing + shared + choices * b * (d + 2 * width))


def _workspace(model: ModelConfig, tokens: int, b: int, local: bool) -> float:
    """Gradients that one block's backward holds: b (2f + d) a token.

    Of experts in model/experts.py on a CPU (`local`): gradients of the rows in and out and of the three weights, and in
    fp32 what one expert of even load works on, its rows 2d + 8f wide and its weights.
    """
    d, width = model.hidden_size, model.moe_intermediate_size or 0
    widest = max(_feed_forward_width(model, layer) for layer in range(model.num_hidden_layers))
    workspace = tokens * b * (2 * widest + d)
    if not (local and model.num_experts):
        return workspace
    rows = tokens * model.num_experts_per_tok
    weights = 3 * d * width
    one = 4 * (rows / model.num_experts * (2 * d + 8 * width) + weights)
    return max(workspace, b * (2 * rows * d + model.num_experts * weights) + one)


def _feed_forward_width(model: ModelConfig, layer: int) -> int:
    """Hidden units that one token activates in a layer."""
    if not model.is_moe_layer(layer):
        return model.intermediate_size or 0
    return (model.num_experts_per_tok + model.num_shared_experts) * (model.moe_intermediate_size or 0)


def _logits(model: ModelConfig, tokens: int, b: int, r: int, chunk: int) -> int:
    """Peak of model/loss.py, every position counted as trained, the worst case.

    A chunk of c tokens holds its product with the vocabulary and fp32 logits and log-probabilities, then the
    latter, the gradient, and the weight's gradient, which several chunks add up in fp32; beside them the hidden
    states' gradient. All at once, log-softmax keeps three fp32 tensors: 12 V T.
    """
    vocabulary, width = model.vocab_size, model.hidden_size
    if chunk == 0:
        return 12 * vocabulary * tokens
    rows, low = min(chunk, tokens), 0 if b == 4 else b
    total = 4 * vocabulary * width if tokens > chunk else 0
    summand = low * vocabulary * width if total else b * vocabulary * width
    softmax = rows * vocabulary * (8 + low)
    product = rows * vocabulary * (4 + low) + summand
    return total + max(softmax, product) + r * width * tokens


def fused_chunk_tokens(model: ModelConfig, tokens: int) -> int:
    """Rows of a chunk of Liger's loss (liger_kernel/ops/fused_linear_cross_entropy.py, 0.8.5)."""
    rows = -(-tokens // -(-model.vocab_size // model.hidden_size))
    return min(tokens, 1 << (rows - 1).bit_length())


def fused_loss_bytes(model: ModelConfig, tokens: int, b: int) -> int:
    """Peak of Liger's loss: the logits of a chunk, which its gradient overwrites, the hidden states' gradient, the
    weight's in fp32, and a chunk's part of that in b."""
    vocabulary, width, rows = model.vocab_size, model.hidden_size, fused_chunk_tokens(model, tokens)
    return b * rows * vocabulary + (4 + b) * vocabulary * width + b * width * tokens


def _all_to_all(model: ModelConfig, tokens: int, spread: float, b: int) -> float:
    """Send and receive buffers of one exchange: k rows of width d out, the fullest rank's share in."""
    return (1 + spread) * tokens * model.num_experts_per_tok * b * model.hidden_size if model.num_experts else 0.0
