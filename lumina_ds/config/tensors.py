"""Every parameter tensor of the model, by name and shape, worked out from the configuration alone.

The planner sums and partitions this list, and the DeepSpeed section sizes its buckets with it, so both
answer without building a model. A test compares it with the real model's `named_parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from math import prod
from typing import Any, TypeVar

from lumina_ds.config.schema import ModelConfig

Result = TypeVar("Result")


def cached_by_model(function: Callable[..., Result]) -> Callable[..., Result]:
    """Remember what a function of a model's configuration and of hashable arguments gave: a plan asks the same of one
    model hundreds of times. The result must not be changed."""

    @lru_cache(maxsize=128)
    def compute(fields: tuple[tuple[str, Any], ...], *rest: Any, **options: Any) -> Result:
        return function(ModelConfig.model_construct(**dict(fields)), *rest, **options)

    @wraps(function)
    def call(model: ModelConfig, *rest: Any, **options: Any) -> Result:
        return compute(tuple(vars(model).items()), *rest, **options)

    return call


@dataclass(frozen=True)
class ParameterTensor:
    """One tensor. `kind` is the part of the model: embedding, attention, norm, router, experts,
    shared_experts, dense_feed_forward or head."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)


@cached_by_model
def parameter_tensors(model: ModelConfig) -> tuple[ParameterTensor, ...]:
    """All tensors in the order of the model's `named_parameters()`; a tied head is not listed twice."""
    return tuple(_tensors(model))


def _tensors(model: ModelConfig) -> Iterator[ParameterTensor]:
    hidden = model.hidden_size
    yield ParameterTensor("model.embed_tokens.weight", (model.vocab_size, hidden), "embedding")
    for layer in range(model.num_hidden_layers):
        yield from _layer(model, layer)
    yield ParameterTensor("model.norm.weight", (hidden,), "norm")
    if not model.tie_word_embeddings:
        yield ParameterTensor("lm_head.weight", (model.vocab_size, hidden), "head")


def num_parameters(model: ModelConfig) -> int:
    """Elements of all tensors together."""
    return sum(tensor.numel for tensor in parameter_tensors(model))


def moe_layers(model: ModelConfig) -> list[int]:
    """Numbers of the layers whose feed-forward is a mixture of experts."""
    return [layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer)]


def _layer(model: ModelConfig, layer: int) -> Iterator[ParameterTensor]:
    prefix, hidden = f"model.layers.{layer}", model.hidden_size
    yield ParameterTensor(f"{prefix}.input_layernorm.weight", (hidden,), "norm")
    yield from _attention(model, f"{prefix}.self_attn")
    yield ParameterTensor(f"{prefix}.post_attention_layernorm.weight", (hidden,), "norm")
    if model.is_moe_layer(layer):
        yield from _mixture(model, f"{prefix}.mlp")
    else:
        yield from _swiglu(f"{prefix}.mlp", hidden, model.intermediate_size or 0, "dense_feed_forward")


def _attention(model: ModelConfig, prefix: str) -> Iterator[ParameterTensor]:
    head, hidden = model.attention_head_dim, model.hidden_size
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    yield ParameterTensor(f"{prefix}.q_proj.weight", (queries, hidden), "attention")
    yield ParameterTensor(f"{prefix}.k_proj.weight", (keys, hidden), "attention")
    yield ParameterTensor(f"{prefix}.v_proj.weight", (keys, hidden), "attention")
    yield ParameterTensor(f"{prefix}.o_proj.weight", (hidden, queries), "attention")
    if model.qk_norm:
        yield ParameterTensor(f"{prefix}.q_norm.weight", (head,), "norm")
        yield ParameterTensor(f"{prefix}.k_norm.weight", (head,), "norm")


def _mixture(model: ModelConfig, prefix: str) -> Iterator[ParameterTensor]:
    experts, hidden, width = model.num_experts, model.hidden_size, model.moe_intermediate_size or 0
    yield ParameterTensor(f"{prefix}.router.gate.weight", (experts, hidden), "router")
    yield ParameterTensor(f"{prefix}.experts.w1", (experts, width, hidden), "experts")
    yield ParameterTensor(f"{prefix}.experts.w2", (experts, hidden, width), "experts")
    yield ParameterTensor(f"{prefix}.experts.w3", (experts, width, hidden), "experts")
    if model.num_shared_experts:
        shared = model.num_shared_experts * width
        yield from _swiglu(f"{prefix}.shared_experts", hidden, shared, "shared_experts")


def _swiglu(prefix: str, hidden: int, width: int, kind: str) -> Iterator[ParameterTensor]:
    yield ParameterTensor(f"{prefix}.gate_proj.weight", (width, hidden), kind)
    yield ParameterTensor(f"{prefix}.up_proj.weight", (width, hidden), kind)
    yield ParameterTensor(f"{prefix}.down_proj.weight", (hidden, width), kind)
