"""What the parent hands to a start of ranks, and where they leave what they find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lumina_ds.config.schema import RunConfig
from lumina_ds.measure.selftest.layouts import Layout

PROGRESS_FILE = "progress.jsonl"


@dataclass(frozen=True)
class Task:
    """What the parent asks of one start of ranks. `max_ranks`: the most that any layout of the self-test has."""

    config: dict[str, Any]
    layouts: list[Layout]
    num_steps: int
    max_ranks: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Task:
        """From what `asdict` gives."""
        return cls(**{**values, "layouts": [Layout(**layout) for layout in values["layouts"]]})


def curve_path(folder: Path, layout: Layout) -> Path:
    """Where a layout's curve lies."""
    words = "-".join(str(value) for value in asdict(layout).values())
    return folder / f"{words}.npz"


def configuration(values: dict[str, Any], layout: Layout, rows_per_step: int) -> RunConfig:
    """The run that a layout is: the common values, and what sets it apart."""
    config = RunConfig.model_validate(values)
    config.train.gradient_accumulation_steps = layout.accumulation
    if layout.zero is not None:
        config.train.micro_batch_size = max(1, rows_per_step // (layout.accumulation * layout.num_ranks))
    config.train.activation_checkpointing = layout.checkpointing  # type: ignore[assignment]
    config.train.loss_chunk_tokens = layout.loss_chunk_tokens
    config.deepspeed.zero_stage = layout.zero  # type: ignore[assignment]
    config.deepspeed.expert_parallel_size = layout.expert_parallel
    if layout.starved:
        config.model.router_bias_update_rate = 0.0
    return config
