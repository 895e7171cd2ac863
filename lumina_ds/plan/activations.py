"""Bytes that a forward pass leaves for the backward pass on one rank, layer by layer, and what each backward works with.

Counted from the tensors that autograd saves in `lumina_ds.model` and in AutoEP's layer. d hidden width, H query and
K key/value heads of width c, f feed-forward width, E experts, k top-k, T tokens of a micro-batch, n rows of experts,
b bytes of a matrix product's operand, r of the residual stream, w of a parameter, p of the products that
model/cpu_products.py chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from lumina_ds.config.schema import ModelConfig
from lumina_ds.plan.loss_memory import loss_bytes
from lumina_ds.plan.shape import Shape

# torch.utils.checkpoint keeps the state of the CPU's random numbers for every part that it recomputes.
RANDOM_STATE_BYTES = 5056
# deepspeed/moe/ep_kernels.py aligns every expert's rows for the grouped product.
_ROW_ALIGNMENT = 8


@dataclass(frozen=True)
class LayerBytes:
    """One block. `attention` and `feed_forward` are what they keep, `norm` either one's norm, without recomputation;
    the `*_anew` flags say what the backward recomputes, of which only an input of `block_input` bytes is kept; `shared_input` of it is
    the norm's own input, which an fp32 residual stream is.

    `attention_copies` and `dense_copies` are low-precision weights that autocast caches until the forward pass ends,
    `expert_copies` those that the experts keep.
    `feed_forward_gradients` and `attention_gradients` are activation gradients at the heights of their backward
    passes; `expert_dispatch` the buffers of the exchange between ranks, `places` where its rows go, which stays with the
    function that is recomputed.
    """

    attention: int
    feed_forward: int
    norm: int
    block_input: int
    shared_input: int
    attention_anew: bool
    feed_forward_anew: bool
    attention_copies: int
    dense_copies: int
    expert_copies: int
    feed_forward_gradients: int
    attention_gradients: int
    expert_dispatch: int
    places: int

    @property
    def kept_attention(self) -> int:
        return 0 if self.attention_anew else self.attention

    @property
    def kept_feed_forward(self) -> int:
        return self.places if self.feed_forward_anew else self.feed_forward

    @property
    def kept_other(self) -> int:
        """Norms that are kept, and the input of what is not."""
        norms = self.norm * ((not self.attention_anew) + (not self.feed_forward_anew))
        return norms + self.block_input * (self.attention_anew or self.feed_forward_anew)

    @property
    def kept_copies(self) -> int:
        """Cast weights that the backward pass finds."""
        attention = 0 if self.attention_anew else self.attention_copies
        return attention + (0 if self.feed_forward_anew else self.dense_copies + self.expert_copies)

    @property
    def made_attention(self) -> int:
        """What the backward pass of a recomputed attention finds beside what was kept."""
        return self.attention + self.norm - self.shared_input if self.attention_anew else 0

    @property
    def made_feed_forward(self) -> int:
        """The same of the feed-forward; under full checkpointing its attention was made with it."""
        if not self.feed_forward_anew:
            return 0
        made = self.feed_forward - self.places + self.norm
        return made + self.made_attention if self.attention_anew else made - self.shared_input

    @property
    def made_copies(self) -> int:
        """Cast weights that recomputing the feed-forward makes anew."""
        if not self.feed_forward_anew:
            return 0
        return self.dense_copies + self.expert_copies + (self.attention_copies if self.attention_anew else 0)


@dataclass(frozen=True)
class ActivationBytes:
    """`layers` in order; `rotary` cosines and sines, which all share; `final_norm`, of it `normalized`, without its
    output, which is `hidden`. `loss` is the height of head and loss beside `hidden`; `head_backward` the gradients of
    the hidden states where they leave the head, `norm_backward` those inside the final norm's backward."""

    layers: tuple[LayerBytes, ...]
    rotary: int
    final_norm: int
    normalized: int
    hidden: int
    loss: int
    head_backward: int
    norm_backward: int

    @property
    def attention(self) -> int:
        return sum(layer.kept_attention for layer in self.layers)

    @property
    def feed_forward(self) -> int:
        return sum(layer.kept_feed_forward for layer in self.layers)

    @property
    def other(self) -> int:
        return sum(layer.kept_other for layer in self.layers) + self.rotary + self.final_norm + self.hidden


def activation_bytes(model: ModelConfig, shape: Shape) -> ActivationBytes:
    """What one micro-batch keeps and works with."""
    tokens, r, d = shape.tokens, shape.r, model.hidden_size
    anew = set(recomputed_layers(model, shape.checkpointing, shape.interval))
    kinds: dict[tuple[bool, bool], LayerBytes] = {}
    layers = []
    for number in range(model.num_hidden_layers):
        kind = (model.is_moe_layer(number), number in anew)
        if kind not in kinds:
            kinds[kind] = _layer(model, shape, *kind)
        layers.append(kinds[kind])
    return ActivationBytes(
        layers=tuple(layers),
        rotary=8 * model.attention_head_dim * tokens,
        final_norm=_norm(d) * tokens,
        normalized=4 * d * tokens,
        hidden=r * d * tokens,
        loss=loss_bytes(model, shape),
        head_backward=2 * r * d * tokens,
        norm_backward=5 * 4 * d * tokens,
    )


def recomputed_layers(model: ModelConfig, checkpointing: str, interval: int) -> list[int]:
    """The blocks that activation checkpointing touches, as model/transformer.py picks them."""
    return [] if checkpointing == "none" else list(range(0, model.num_hidden_layers, interval))


def expert_rows(model: ModelConfig, shape: Shape) -> int:
    """n: rows that the fullest rank's experts compute, alignment included."""
    rows = shape.tokens * model.num_experts_per_tok
    if _is_local(shape):
        return rows
    load = shape.load.rank if shape.expert_parallel_size > 1 else 1.0
    return ceil(load * rows) + _ROW_ALIGNMENT * (model.num_experts // shape.expert_parallel_size)


def _is_local(shape: Shape) -> bool:
    """On a CPU, experts that are not spread run in our own layer (engine/deepspeed/expert_parallel.py)."""
    return shape.device == "cpu" and shape.expert_parallel_size == 1


def _layer(model: ModelConfig, shape: Shape, is_moe: bool, anew: bool) -> LayerBytes:
    tokens, d = shape.tokens, model.hidden_size
    queries, keys = _widths(model)
    attention_matrices = 2 * d * queries + 2 * d * keys
    experts = 3 * (model.num_experts // shape.expert_parallel_size) * d * (model.moe_intermediate_size or 0)
    dense = 3 * d * _dense_width(model, is_moe)
    mixed = shape.r > shape.b
    return LayerBytes(
        attention=tokens * _attention(model, shape),
        feed_forward=_mixture(model, shape) if is_moe else tokens * _dense(model, shape),
        norm=tokens * _norm(d),
        block_input=tokens * shape.r * d + RANDOM_STATE_BYTES,
        places=_places(model, shape) if is_moe else 0,
        shared_input=tokens * 4 * d if shape.r == 4 else 0,
        attention_anew=anew and shape.checkpointing in ("full", "attention"),
        feed_forward_anew=anew and shape.checkpointing in ("full", "experts"),
        attention_copies=shape.b * attention_matrices if shape.casts else 0,
        dense_copies=shape.b * dense if shape.casts else 0,
        expert_copies=shape.b * experts if mixed and is_moe else 0,
        feed_forward_gradients=_feed_forward_gradients(model, shape, is_moe, experts),
        attention_gradients=tokens * (shape.r * d + shape.b * 2 * (queries + keys) + 8 * queries),
        expert_dispatch=_dispatch(model, shape) if is_moe else 0,
    )


def _widths(model: ModelConfig) -> tuple[int, int]:
    """Hc and Kc."""
    head = model.attention_head_dim
    return model.num_attention_heads * head, model.num_key_value_heads * head


def _dense_width(model: ModelConfig, is_moe: bool) -> int:
    """f of a layer's SwiGLU: of a dense layer, or of the shared experts."""
    if is_moe:
        return model.num_shared_experts * (model.moe_intermediate_size or 0)
    return model.intermediate_size or 0


def _norm(width: int) -> int:
    """RMSNorm in fp32 (model/feed_forward.py): input 4, normalized 4 per element, the root's inverse 4 a row.
    A fused CUDA kernel saves less; this is the bound."""
    return 8 * width + 4


def _attention(model: ModelConfig, shape: Shape) -> int:
    """Input, q, k, v, output and its packed copy, and the log-sum-exp of a fused kernel: b (d + 3Hc + 2Kc) + 4H.

    Where autocast casts the input, each of the three projections keeps a copy of its own; at ZeRO-3 they share the
    norm's output, uncast.
    """
    queries, keys = _widths(model)
    heads = model.num_attention_heads + model.num_key_value_heads
    qk_norm = heads * _norm(model.attention_head_dim) if model.qk_norm else 0
    inputs = 3 * shape.b if shape.casts else shape.r
    return inputs * model.hidden_size + shape.b * (3 * queries + 2 * keys) + 4 * model.num_attention_heads + qk_norm


def _dense(model: ModelConfig, shape: Shape) -> int:
    """SwiGLU: input, gate, up, the gate's silu and their product, b (d + 4f); under autocast an input for gate and up
    each."""
    inputs = 2 * shape.b if shape.casts else shape.r
    return inputs * model.hidden_size + 4 * shape.b * (model.intermediate_size or 0)


def _mixture(model: ModelConfig, shape: Shape) -> int:
    """The router's fp32 input, scores and places; the experts' rows; shared experts as a dense layer.

    Ours on a CPU (model/experts.py) keeps rows, gate and up, b (d + 2f) a row, and computes the rest again; under
    expert parallelism AutoEP keeps the k outputs of a token to weigh as well. Elsewhere the grouped kernels keep
    b (d + 4f) a row, and the router about 22E.
    """
    tokens, b, d, k = shape.tokens, shape.b, model.hidden_size, model.num_experts_per_tok
    width, experts = model.moe_intermediate_size or 0, model.num_experts
    shared = 4 * b * model.num_shared_experts * width
    # In fp32 the router's input is the shared experts' too.
    shared += b * d if model.num_shared_experts and b != 4 else 0
    rows = expert_rows(model, shape)
    if shape.device != "cpu":
        return tokens * (4 * d + 22 * experts + b * k * d + shared) + rows * b * (d + 4 * width)
    # Scores and probabilities 8E, four numbers a token, and a choice's places: four int64, weights, a flag.
    routing = 4 * d + 8 * experts + 16 + (41 + b if not _is_local(shape) else 45 + b) * k
    if _is_local(shape):
        return tokens * (routing + shared) + rows * b * (d + 2 * width)
    return tokens * (routing - b * k + b * k * d + shared) + rows * (b * (d + 2 * width) + 12 + b)


def _feed_forward_gradients(model: ModelConfig, shape: Shape, is_moe: bool, experts: int) -> int:
    """Gradients beside what was kept, at the height of the feed-forward's backward.

    Dense: the residual stream's r d, and of the product and its two factors, b 3f, while the product, b f, is let go.
    """
    tokens, b, r, d = shape.tokens, shape.b, shape.r, model.hidden_size
    if not is_moe:
        return tokens * (r * d + 2 * b * (model.intermediate_size or 0))
    if shape.device != "cpu":
        width = (model.num_experts_per_tok + model.num_shared_experts) * (model.moe_intermediate_size or 0)
        # The gradient of the experts' last matrix comes with that of their hidden units.
        return tokens * (r * d + 2 * b * width) + shape.w * experts // 3
    return _mix_gradients(model, shape, experts)


def _mix_gradients(model: ModelConfig, shape: Shape, experts: int) -> int:
    """Backward of `_MixOnCpu`: gradients of the rows in and out and of the three weights; beside them what the busiest
    expert needs in the product's type, or at the end the tokens' gradients, the weights' in the parameters' type, and
    what the last expert left."""
    tokens, b, d, p = shape.tokens, shape.b, model.hidden_size, shape.p
    width, local = model.moe_intermediate_size or 0, _is_local(shape)
    rows = expert_rows(model, shape)
    even = rows // max(1, model.num_experts // shape.expert_parallel_size)
    # An expert has no more rows than tokens.
    busiest = min(ceil(shape.load.expert * even), shape.expert_parallel_size * tokens)
    casts = p != b
    row = (4 * width + (2 * (d + width) if casts else 0)) * p
    in_loop = busiest * (row + d * p) + (d * width * p if casts else 0)
    given_back = b * d * (tokens if local else rows) + (shape.w * experts if shape.w != b else 0)
    at_end = even * row + given_back
    # Autocast's gradient of the layer's output, which AutoEP lets go.
    low = tokens * b * d if shape.r != b and local else 0
    # AutoEP's buffer of outputs to weigh is let go before.
    weighed = 0 if local else b * model.num_experts_per_tok * tokens * d
    return tokens * shape.r * d + low - weighed + 2 * rows * b * d + b * experts + max(in_loop, at_end)


def _dispatch(model: ModelConfig, shape: Shape) -> int:
    """Buffers beside what is kept: rows as they came, in the experts' order, and their outputs, b d each; the backward
    holds one of them."""
    if shape.expert_parallel_size == 1:
        return 0
    return expert_rows(model, shape) * shape.b * model.hidden_size


def _places(model: ModelConfig, shape: Shape) -> int:
    """model/experts.py, RowPlan: three int64 a choice, or one a row where AutoEP has sorted the rows."""
    if shape.device != "cpu":
        return 0
    if _is_local(shape):
        return 24 * shape.tokens * model.num_experts_per_tok
    return 8 * expert_rows(model, shape)
