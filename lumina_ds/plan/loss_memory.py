"""Bytes of head and loss at their height: of model/loss.py, and of Liger's loss where that may run.

V ids, d hidden width, T tokens of a micro-batch, c of a chunk; b, r, w and p as in shape.py.
"""

from __future__ import annotations

from lumina_ds.config.precision import loss_chunk_tokens
from lumina_ds.config.schema import ModelConfig
from lumina_ds.plan.shape import Shape


def loss_bytes(model: ModelConfig, shape: Shape) -> int:
    """Height of model/loss.py beside the hidden states, every position counted as trained, the worst case.

    The trained positions and their gradient, r d T each. A chunk of c tokens holds its product with the vocabulary and
    fp32 log-probabilities, then those, their gradient and the weight's gradient, which several chunks add up in fp32.
    All at once, log-softmax keeps three fp32 tensors: 12 V T.
    """
    tokens, vocabulary, d = shape.tokens, model.vocab_size, model.hidden_size
    chunk = loss_chunk_tokens(shape.loss_chunk, vocabulary)
    if chunk == 0:
        return 12 * vocabulary * tokens + shape.r * d * tokens
    parts = loss_parts(model, shape, chunk)
    return sum((fused_loss_parts(model, shape) if takes_fused_loss(model, shape, parts) else parts).values())


def takes_fused_loss(model: ModelConfig, shape: Shape, parts: dict[str, int]) -> bool:
    """Whether Liger's loss may run and is higher than ours, which takes `parts`."""
    return shape.fused_loss and sum(fused_loss_parts(model, shape).values()) > sum(parts.values())


def fused_chunk_tokens(model: ModelConfig, tokens: int) -> int:
    """Rows of a chunk of Liger's loss (liger_kernel/ops/fused_linear_cross_entropy.py, 0.8.5)."""
    rows = -(-tokens // -(-model.vocab_size // model.hidden_size))
    return min(tokens, 1 << (rows - 1).bit_length())


def fused_loss_parts(model: ModelConfig, shape: Shape) -> dict[str, int]:
    """Height of Liger's loss beside the hidden states: the trained positions, a cast copy of them and the gradients of
    both; a cast weight; the weight's gradient in fp32 and a chunk's part of it in b; the logits of a chunk, which their
    gradient overwrites."""
    tokens, b, casts = shape.tokens, shape.b, shape.r != shape.b
    weight = model.vocab_size * model.hidden_size
    return {
        "states": 2 * model.hidden_size * tokens * (shape.r + (b if casts else 0)),
        "weight": b * weight if shape.w != b else 0,
        "sum": (4 + b) * weight,
        "chunk": b * fused_chunk_tokens(model, tokens) * model.vocab_size,
    }


def loss_parts(model: ModelConfig, shape: Shape, chunk: int) -> dict[str, int]:
    """`_loss` by what takes it: states, weight, sum, chunk."""
    tokens, vocabulary, d, p = shape.tokens, model.vocab_size, model.hidden_size, shape.p
    rows, several = min(chunk, tokens), tokens > chunk
    weight = vocabulary * d
    # A CPU makes an fp32 copy of low logits before it takes their softmax.
    converted = 4 if shape.device == "cpu" and p < 4 else 0
    softmax = rows * vocabulary * (p + 4 + converted)
    gradient = rows * vocabulary * (4 + (p if p < 4 else 0))
    summand = 0 if several and p == 4 else p * weight
    # After the loop the weight's gradient takes the weight's type.
    returned = (0 if several else p * weight) + (shape.w * weight if shape.w != p else 0)
    return {
        "states": 2 * shape.r * d * tokens + (p * d * rows if p != shape.r else 0),
        "weight": p * weight if p != shape.w else 0,
        "sum": 4 * weight if several else 0,
        "chunk": max(softmax, gradient + max(p * d * rows, summand), returned),
    }
