"""What a run is before it begins: its configuration with all that follows from it, its rows and its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lumina_ds.checkpoint.manifest import RunIdentity
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.elastic import for_ranks
from lumina_ds.config.schema import RunConfig, TrainConfig, ZeroStage
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.mixture.order import MixtureOrder
from lumina_ds.data.mixture.rows import MixedRows
from lumina_ds.data.mixture.state import MixtureState
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.engine.world import World
from lumina_ds.model.device import device_and_precision
from lumina_ds.plan.duration import checkpoint_bytes
from lumina_ds.text import counted
from lumina_ds.train.evaluation_sets import EvaluationSet, judged_by
from lumina_ds.train.health import StepHealth
from lumina_ds.train.resume import run_identity
from lumina_ds.train.run_folder import effective_config
from lumina_ds.train.state import RunLength, RunState


@dataclass(frozen=True)
class Setting:
    """Fixed for the life of a run. `asked` is what the user configured; of an elastic run, `config` is what these ranks
    make of it. `why_precision` is for its first line."""

    asked: RunConfig
    config: RunConfig
    rows: PackedRows | MixedRows
    eval_sets: tuple[EvaluationSet, ...]
    world: World
    precision: str
    why_precision: str
    deepspeed_json: dict[str, Any]
    length: RunLength
    changes_of_mixture: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, config: RunConfig, rows: PackedRows | MixedRows, eval_sets: Sequence[EvaluationSet], world: World
    ) -> Setting:
        """Raises ConfigError, or MachineError for a precision that this machine does not have."""
        asked, config = config, for_ranks(config, world.size)
        _, precision, why = device_and_precision(config.train.precision, config.model)
        deepspeed_json = compose_deepspeed(config, world.size, precision)
        readers = world.share.size
        if isinstance(rows, MixedRows):
            length = RunLength.of_mixture(config, _mixture_order(config, rows), readers)
        else:
            length = RunLength.of(config, rows.num_rows, readers)
        return cls(asked, config, rows, tuple(eval_sets), world, precision, why, deepspeed_json, length)

    def going_on(self, state: RunState, filled: Sequence[Sequence[int]], mixture: MixtureState | None) -> Setting:
        """That of a life which goes on after a checkpoint whose manifest says `filled` and `mixture`: shorter lives may
        have trained empty rows, and sources may have other weights from here on. `state` gets the order of this life.
        """
        length, changes = self.length, []
        if isinstance(state.order, MixtureOrder) and mixture is not None:
            changes = state.order.go_on_from(mixture)
            length = RunLength.of_mixture(self.config, state.order, self.world.share.size)
        length = length.after_filling(sum(count for _, count in filled))
        return replace(self, length=length, changes_of_mixture=tuple(changes))

    def fresh_state(self) -> RunState:
        """That of a run which has not begun."""
        config, rows = self.config, self.rows
        order = (
            _mixture_order(config, rows)
            if isinstance(rows, MixedRows)
            else TrainingOrder(rows.num_rows, config.train.seed, self.length.total_rows)
        )
        return RunState(order, StepHealth(config.health))

    @property
    def num_sources(self) -> int:
        """Sources of a mixture; 0 for training data without a name."""
        return len(self.rows.names) if isinstance(self.rows, MixedRows) else 0

    def last_step(self, state: RunState) -> int:
        """Where this process ends: with the run, or before, at train.stop_at_step."""
        end = self.length.last_step(state.order)
        return min(end, self.config.train.stop_at_step or end)

    def ends_early(self, state: RunState) -> int | None:
        """train.stop_at_step where it ends this process before the whole run ends."""
        return self.config.train.stop_at_step if state.step < self.length.last_step(state.order) else None

    @property
    def notes_on_length(self) -> list[str]:
        """Settings of the run's length that change nothing, for its first lines."""
        train, num_steps = self.config.train, self.length.num_steps
        notes = []
        if train.max_steps is not None and train.epochs != TrainConfig.model_fields["epochs"].default:
            notes.append(
                f"train.max_steps {train.max_steps} is the run's length; train.epochs {train.epochs} is not used"
            )
        if (train.stop_at_step or 0) > num_steps:
            notes.append(
                f"--stop-at-step {train.stop_at_step} is beyond the run's end at step {num_steps}; it ends there"
            )
        return notes

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
            f"{self.config.run_name}: {counted(length.num_steps, 'step')} of {counted(length.rows_per_step, 'row')} x "
            f"{self.config.seq_length} tokens, {self.strategy} ({self.why_precision}), "
            f"{counted(self.world.size, 'rank')} on {self.world.device}"
        )

    @cached_property
    def effective_config(self) -> dict[str, Any]:
        """The configuration with the data as it really is."""
        return effective_config(self.asked, self.rows, self.eval_sets)

    @cached_property
    def identity(self) -> RunIdentity:
        """What a checkpoint must share with this run."""
        layout = (self.world.size, self.zero_stage, self.precision)
        return run_identity(self.config, *layout, self.rows, self.length.rows_per_step)

    @cached_property
    def of_checkpoints(self) -> tuple[RunIdentity, dict[str, Any], int, str | None]:
        """What every checkpoint says alike: identity, configuration, rows of a step, what its loss is one of."""
        judged = judged_by(self.config.train.best_by, self.eval_sets)
        return self.identity, self.effective_config, self.length.rows_per_step, judged

    @property
    def checkpoint_bytes(self) -> int:
        """What a checkpoint takes on the disk, all ranks together."""
        return checkpoint_bytes(self.config, self.precision).total


def _mixture_order(config: RunConfig, rows: MixedRows) -> MixtureOrder:
    train = config.train
    return rows.order(config.data, train.seed, None if train.max_steps is not None else train.epochs)
