"""Counted parameters of a model, by part, without building it: the basis of presets, memory and FLOPs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lumina_ds.config.schema import ModelConfig
from lumina_ds.config.tensors import cached_by_model, parameter_tensors


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of elements. `active` is what one token passes through: everything but the experts it skips."""

    total: int
    active: int
    embedding: int
    attention: int
    experts: int
    shared_experts: int
    dense_feed_forward: int
    router: int
    norm: int
    head: int

    @property
    def bf16_bytes(self) -> int:
        """Bytes of the weights alone in bfloat16."""
        return 2 * self.total


@cached_by_model
def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Count every tensor of the model; a tied head counts once, as embedding."""
    kinds: Counter[str] = Counter()
    for tensor in parameter_tensors(model):
        kinds[tensor.kind] += tensor.numel
    experts = kinds["experts"]
    # Every expert has the same shape, so the split is exact.
    visited = experts // model.num_experts * model.num_experts_per_tok if model.num_experts else 0
    return ParameterCounts(
        total=kinds.total(),
        active=kinds.total() - experts + visited,
        embedding=kinds["embedding"],
        attention=kinds["attention"],
        experts=experts,
        shared_experts=kinds["shared_experts"],
        dense_feed_forward=kinds["dense_feed_forward"],
        router=kinds["router"],
        norm=kinds["norm"],
        head=kinds["head"],
    )
