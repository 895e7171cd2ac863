"""The choices that trade memory for communication or computation, and the run that one such choice makes.

`layouts` lists them in the order of their cost: higher ZeRO stages first, then recomputation, smaller buckets,
expert parallelism, ZeRO-3, and offload last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

from lumina_ds.config.deepspeed.compose import compose_deepspeed, pins_batch, resolve_zero_stage, with_batch
from lumina_ds.config.schema import Offload, RunConfig
from lumina_ds.errors import ConfigError

OFFLOADS: tuple[Offload, ...] = get_args(Offload)
SMALL_BUCKET = 50_000_000


@dataclass(frozen=True)
class Layout:
    """`zero_stage` None leaves it to the run; `small_bucket` reduces gradients by SMALL_BUCKET elements at a time."""

    zero_stage: int | None
    expert_parallel_size: int
    activation_checkpointing: str
    small_bucket: bool = False
    offload: str = "none"

    @property
    def label(self) -> str:
        parts = [f"ZeRO-{self.zero_stage}"] if self.zero_stage is not None else []
        if self.expert_parallel_size > 1:
            parts.append(f"expert parallel {self.expert_parallel_size}")
        if self.activation_checkpointing != "none":
            parts.append(f"activation checkpointing {self.activation_checkpointing}")
        if self.small_bucket:
            parts.append(f"buckets of {SMALL_BUCKET:,} elements")
        if self.offload != "none":
            parts.append(f"offload of {self.offload.replace('+', ' and ')}")
        return ", ".join(parts) or "as configured"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Fixed:
    """What the user has decided; None leaves it to the search."""

    zero_stage: int | None = None
    expert_parallel_size: int | None = None
    activation_checkpointing: str | None = None
    offload: str | None = None


def layouts(config: RunConfig, world_size: int, gpus_per_node: int, precision: str, fixed: Fixed) -> Iterator[Layout]:
    """Every layout that can run, cheapest first; experts are spread inside a node only."""
    half = precision in ("bf16", "fp16")
    low = (1, 2) if half else (0, 1, 2)
    checkpointing = [fixed.activation_checkpointing] if fixed.activation_checkpointing else ["none", "full"]
    sizes = (
        [fixed.expert_parallel_size] if fixed.expert_parallel_size else _expert_sizes(config, gpus_per_node, world_size)
    )
    if config.deepspeed.config is not None:
        # The user's JSON decides buckets and offload, and the stage unless the run does.
        stage = config.deepspeed.zero_stage if fixed.zero_stage is None else fixed.zero_stage
        for size in sizes:
            for kept in checkpointing:
                yield Layout(stage, size, kept)
        return
    asked = fixed.offload or config.deepspeed.offload
    for offload in [asked] if asked else OFFLOADS:
        for stages in (low, (3,)):
            for size in sizes:
                for small_bucket in (False, True):
                    for kept in checkpointing:
                        for stage in stages:
                            if _sensible(stage, offload, fixed, asked):
                                yield Layout(stage, size, kept, small_bucket, offload)


def apply_layout(config: RunConfig, layout: Layout, micro_batch: int, accumulation: int) -> RunConfig:
    """A copy of `config` with this layout and batch; buckets are not part of it (see `layout_json`)."""
    changed = config.model_copy(deep=True)
    changed.deepspeed.zero_stage = layout.zero_stage  # type: ignore[assignment]
    if config.deepspeed.config is None:
        changed.deepspeed.offload = None if layout.offload == "none" else layout.offload  # type: ignore[assignment]
    changed.deepspeed.expert_parallel_size = layout.expert_parallel_size
    changed.train.activation_checkpointing = layout.activation_checkpointing  # type: ignore[assignment]
    changed.train.global_batch_size = None
    changed.train.micro_batch_size = micro_batch
    changed.train.gradient_accumulation_steps = accumulation
    return changed


class Composer:
    """DeepSpeed JSON for the layouts of one run. Each ZeRO stage, expert-parallel size and offload is composed once;
    micro-batch, accumulation and number of ranks change the batch only, unless the run's own file pins that."""

    def __init__(self, config: RunConfig, precision: str) -> None:
        self.precision = precision
        self._pins_batch = pins_batch(config)
        self._known: dict[tuple[Any, ...], dict[str, Any] | ConfigError] = {}

    def json(self, config: RunConfig, world_size: int) -> dict[str, Any]:
        """A JSON of its own for `config`, a variant of the run; ConfigError where it cannot be composed."""
        key = self._key(config, world_size)
        if key not in self._known:
            try:
                self._known[key] = compose_deepspeed(config, world_size, self.precision)
            except ConfigError as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, ConfigError):
            raise known
        return with_batch(known, config, world_size)

    def _key(self, config: RunConfig, world_size: int) -> tuple[Any, ...]:
        deepspeed, train = config.deepspeed, config.train
        try:
            stage: Any = resolve_zero_stage(config, world_size, self.precision)
        except ConfigError:
            stage = f"{deepspeed.zero_stage}, refused"
        batch = (world_size, train.micro_batch_size, train.gradient_accumulation_steps) if self._pins_batch else ()
        return (stage, deepspeed.expert_parallel_size, deepspeed.offload or "none", *batch)


def layout_json(config: RunConfig, layout: Layout, world_size: int, composer: Composer) -> dict[str, Any]:
    """The DeepSpeed JSON of a run that `apply_layout` made, with the layout's buckets."""
    json = composer.json(config, world_size)
    if layout.small_bucket:
        zero = json["zero_optimization"]
        zero["reduce_bucket_size"] = min(zero.get("reduce_bucket_size", SMALL_BUCKET), SMALL_BUCKET)
    return json


def _sensible(stage: int, offload: str, fixed: Fixed, asked: str | None) -> bool:
    if fixed.zero_stage is not None and stage != fixed.zero_stage:
        return False
    # Stage 2 costs no more than 1 and holds less; with offload, 1 is for those who name both.
    stages = (1, 2, 3) if asked and fixed.zero_stage == 1 else (2, 3)
    return {"none": True, "optimizer": stage in stages, "optimizer+params": stage == 3}[offload]


def _expert_sizes(config: RunConfig, gpus_per_node: int, world_size: int) -> list[int]:
    experts = config.model.num_experts
    if not experts:
        return [1]
    return [n for n in range(1, gpus_per_node + 1) if experts % n == 0 and world_size % n == 0]
