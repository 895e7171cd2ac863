"""What a run is before it begins: its configuration with all that follows from it, its rows and its ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lumina_ds.checkpoint.manifest import RunIdentity
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig, ZeroStage
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.engine.world import World
from lumina_ds.model.device import device_and_precision
from lumina_ds.plan.duration import checkpoint_bytes
from lumina_ds.text import counted
from lumina_ds.train.health import StepHealth
from lumina_ds.train.resume import run_identity
from lumina_ds.train.run_folder import effective_config
from lumina_ds.train.state import RunLength, RunState


@dataclass(frozen=True)
class Setting:
    """Fixed for the life of a run. `why_precision` is for its first line."""

    config: RunConfig
    rows: PackedRows
    eval_rows: PackedRows | None
    world: World
    precision: str
    why_precision: str
    deepspeed_json: dict[str, Any]
    length: RunLength

    @classmethod
    def of(cls, config: RunConfig, rows: PackedRows, eval_rows: PackedRows | None, world: World) -> Setting:
        """Raises ConfigError, or MachineError for a precision that this machine does not have."""
        _, precision, why = device_and_precision(config.train.precision, config.model)
        deepspeed_json = compose_deepspeed(config, world.size, precision)
        length = RunLength.of(config, rows.num_rows, world.share.size)
        return cls(config, rows, eval_rows, world, precision, why, deepspeed_json, length)

    def after_filling(self, num_filled: int) -> Setting:
        """That of a life which goes on after shorter ones that trained so many empty rows."""
        return replace(self, length=self.length.after_filling(num_filled))

    def fresh_state(self) -> RunState:
        """That of a run which has not begun."""
        order = TrainingOrder(self.rows.num_rows, self.config.train.seed, self.length.total_rows)
        return RunState(order, StepHealth(self.config.health))

    def last_step(self, state: RunState) -> int:
        """Where this process ends: with the run, or before, at train.stop_at_step."""
        end = self.length.last_step(state.order)
        return min(end, self.config.train.stop_at_step or end)

    @property
    def zero_stage(self) -> ZeroStage:
        return self.deepspeed_json["zero_optimization"]["stage"]

    @property
    def strategy(self) -> str:
        """`ZeRO-2 EP2 fp32`."""
        return f"ZeRO-{self.zero_stage} EP{self.config.deepspeed.expert_parallel_size} {self.precision}"

    @property
    def banner(self) -> str:
        """The first line of a run."""
        length = self.length
        return (
            f"{self.config.run_name}: {length.num_steps} steps of {length.rows_per_step} rows x "
            f"{self.config.seq_length} tokens, {self.strategy} ({self.why_precision}), "
            f"{counted(self.world.size, 'rank')} on {self.world.device}"
        )

    @cached_property
    def effective_config(self) -> dict[str, Any]:
        """The configuration with the data as it really is."""
        return effective_config(self.config, self.rows, self.eval_rows)

    @cached_property
    def identity(self) -> RunIdentity:
        """What a checkpoint must share with this run."""
        layout = (self.world.size, self.zero_stage, self.precision)
        return run_identity(self.config, *layout, self.rows.folder, self.length.rows_per_step)

    @property
    def checkpoint_bytes(self) -> int:
        """What a checkpoint takes on the disk, all ranks together."""
        return checkpoint_bytes(self.config, self.precision).total
