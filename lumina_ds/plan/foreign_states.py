"""Bytes that the states of any model take under DeepSpeed: from a list of its tensors, whoever wrote the model.

Parameters, optimizer, gradients, buckets and what ZeRO-3 gathers follow states.py and gathering.py. Activations depend on
the model's code, so nothing is said of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from lumina_ds.config.deepspeed.tree import section_of
from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.tensors import ParameterTensor
from lumina_ds.errors import ConfigError
from lumina_ds.plan.gathering import Gathered, Limits, Tensor, follow
from lumina_ds.plan.shape import PARAMETER_BYTES
from lumina_ds.plan.states import OptimizerGroup, ZeroSettings, state_bytes
from lumina_ds.text import nearest

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class ForeignModel:
    """A model by its tensors, in the order of its `named_parameters()`; a tied head is not listed twice.

    `kind` of a tensor as in config/tensors.py, or "other"; `frozen` are names of tensors that are not trained.
    """

    name: str
    family: str
    tensors: tuple[ParameterTensor, ...]
    hidden_size: int
    tied: bool
    frozen: frozenset[str] = frozenset()

    @property
    def kinds(self) -> Counter[str]:
        """Elements of each kind."""
        found: Counter[str] = Counter()
        for tensor in self.tensors:
            found[tensor.kind] += tensor.numel
        return found

    @cached_property
    def total(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @cached_property
    def trainable(self) -> int:
        return sum(tensor.numel for tensor in self.tensors if tensor.name not in self.frozen)

    @property
    def largest_layer(self) -> tuple[str, int]:
        """The module list's entry (model.layers.3), or the module outside of them, that holds the most; its elements."""
        layers: Counter[str] = Counter()
        for tensor in self.tensors:
            layers[_layer_of(tensor.name)] += tensor.numel
        return layers.most_common(1)[0]

    def frozen_by(self, patterns: Sequence[str]) -> ForeignModel:
        """The same with every tensor frozen whose name one of the patterns matches (`*.experts.*`); ConfigError for one
        that matches none, or where nothing is left to train."""
        names = [tensor.name for tensor in self.tensors]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"--freeze {pattern} matches no parameter of {self.name}{nearest(pattern, names)}; "
                    "* stands for any text, as in '*.experts.*'"
                )
        frozen = frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
        if len(frozen) == len(names):
            raise ConfigError(f"--freeze {' '.join(patterns)} leaves nothing of {self.name} to train")
        return replace(self, frozen=frozen)


@dataclass(frozen=True)
class ForeignStates:
    """Bytes on one rank of a model's states at a ZeRO stage. `gradients`, `buckets` and `gathered` are heights in the
    backward pass; the optimizer's step begins with `step_gradients` and makes `step`; `host` is offloaded."""

    stage: int
    parameters: int
    master_weights: int
    moments: int
    gradients: int
    buckets: int
    gathered: int
    step_gradients: int
    step: int
    host: int

    @property
    def peak(self) -> int:
        """The highest of backward pass and step, without activations."""
        passing = self.gradients + self.buckets + self.gathered
        return self.parameters + self.master_weights + self.moments + max(passing, self.step_gradients + self.step)


def foreign_states(
    model: ForeignModel, world_size: int, precision: str, json: Mapping[str, Any], optimizer: str = "adamw"
) -> ForeignStates:
    """States of one of `world_size` ranks under a DeepSpeed JSON whose "auto" were filled in (filled_in).

    Weights are without decay where they are norms or biases, as Trainer and we group them.
    """
    width = PARAMETER_BYTES[precision]
    zero = ZeroSettings.from_json(json, width)
    groups = _groups(model, world_size, optimizer)
    accumulation = json.get("gradient_accumulation_steps", 1)
    states = state_bytes(groups, zero, width, width, accumulation if isinstance(accumulation, int) else 1)
    frozen = [tensor.numel for tensor in model.tensors if tensor.name in model.frozen]
    held = _shares(frozen, zero, world_size) if zero.stage == 3 else sum(frozen)
    gathered = _gathered(model, zero, world_size, width) if zero.stage == 3 else Gathered()
    on_host = zero.stage == 3 and zero.offload_param != "none"
    return ForeignStates(
        stage=zero.stage,
        parameters=states.parameters + (0 if on_host else width * held),
        master_weights=states.master_weights,
        moments=states.moments,
        gradients=states.gradients,
        buckets=states.bucket + states.flattened,
        gathered=max(gathered.highest, gathered.backward, gathered.head),
        step_gradients=states.step_gradients,
        step=states.step + states.step_bucket - states.released,
        host=states.host + (width * held if on_host else 0),
    )


def filled_in(json: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """A DeepSpeed JSON with the "auto" of zero_optimization as transformers' Trainer fills them (read:
    integrations/deepspeed.py): the bucket is hidden_size squared, 0.9 of it are prefetched, 10 hidden_size persist."""
    values = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero = {
        name: values.get(name) if value == "auto" else value
        for name, value in section_of(json, "zero_optimization").items()
    }
    return {**json, "zero_optimization": {name: value for name, value in zero.items() if value is not None}}


def _groups(model: ForeignModel, world_size: int, optimizer: str) -> list[OptimizerGroup]:
    trained = [tensor for tensor in model.tensors if tensor.name not in model.frozen]
    plain = [tensor.kind == "norm" or tensor.name.endswith("bias") for tensor in trained]
    entry = OPTIMIZERS[optimizer]
    parts = {
        "decay": tuple(tensor.numel for tensor, is_plain in zip(trained, plain, strict=True) if not is_plain),
        "no_decay": tuple(tensor.numel for tensor, is_plain in zip(trained, plain, strict=True) if is_plain),
    }
    return [
        OptimizerGroup(name, numels, world_size, moment_bytes=entry.moment_bytes, step_bytes=entry.step_bytes)
        for name, numels in parts.items()
        if numels
    ]


def _shares(numels: Sequence[int], zero: ZeroSettings, world_size: int) -> int:
    """Elements of one rank at stage 3: its share of each tensor, and the small ones whole beside it."""
    shares = [-(-numel // world_size) for numel in numels]
    return sum(shares) + sum(
        share * world_size
        for share, numel in zip(shares, numels, strict=True)
        if numel <= zero.persistence_threshold and world_size > 1
    )


def _gathered(model: ForeignModel, zero: ZeroSettings, world_size: int, width: int) -> Gathered:
    """A single rank's partition is the whole tensor, unless it is on the host."""
    if world_size == 1 and zero.offload_param == "none":
        return Gathered()
    modules: list[list[Tensor]] = []
    previous = None
    for number, tensor in enumerate(model.tensors):
        module = tensor.name.rpartition(".")[0]
        if module != previous:
            modules.append([])
        previous = module
        if tensor.numel > zero.persistence_threshold:
            modules[-1].append(Tensor(number, tensor.numel, width, width))
    if model.tied:
        modules.append(list(modules[0]))
    return follow(modules, Limits(zero.prefetch_bucket_size, zero.max_live_parameters, zero.max_reuse_distance))


def _layer_of(name: str) -> str:
    """model.layers.3 of model.layers.3.mlp.up_proj.weight; the module of a tensor that is in no list."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1])
