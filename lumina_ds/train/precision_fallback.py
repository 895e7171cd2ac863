"""A run that becomes unstable goes on from its last sound checkpoint in a safer precision, where the user allows it.

The engine is built anew in the same process. The choice is kept in the run folder, so that later lives of the run do
not go back to the precision that failed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.mixture.rows import MixedRows
from lumina_ds.engine.build import release
from lumina_ds.engine.world import World
from lumina_ds.errors import CheckpointError, MachineError, UnstableError
from lumina_ds.files import write_atomically
from lumina_ds.model.device import device_and_precision
from lumina_ds.train.evaluation_sets import EvaluationSet
from lumina_ds.train.run import TrainingRun
from lumina_ds.train.run_folder import RunFolder

log = logging.getLogger(__name__)

RECORD = "precision.json"
# Both keep fp32 weights: autocast alone, and then no 16-bit arithmetic at all.
_SAFER = {"fp16": ("mixed_bf16", "fp32"), "bf16": ("mixed_bf16", "fp32"), "mixed_bf16": ("fp32",)}


def train_with_fallback(
    config: RunConfig, rows: PackedRows | MixedRows, eval_sets: Sequence[EvaluationSet], world: World
) -> None:
    """Train; on UnstableError, with train.precision_fallback, again in the next safer precision until none is left."""
    record = RunFolder.of(config).path / RECORD
    if config.train.precision_fallback and (remembered := read_record(record)) is not None:
        config = _changed(config, remembered)
    # Not by one rank while another has yet to read it.
    dist.barrier()
    while True:
        run = TrainingRun(config, rows, eval_sets, world)
        try:
            run.run()
            return
        except UnstableError as error:
            safer = safer_precision(run.setting.precision) if config.train.precision_fallback else None
            if safer is None:
                raise
            if world.rank == 0:
                log.warning(
                    "%s. Going on from the last sound checkpoint in %s instead of %s",
                    error,
                    safer,
                    run.setting.precision,
                )
                failed = {"precision": safer, "instead_of": run.setting.precision, "step": run.state.step}
                write_atomically(record, json.dumps(failed | {"reason": str(error)}, indent=1))
            config = _changed(config, safer)
            config.deepspeed.zero_stage = run.setting.zero_stage
        config.run.resume = "auto"
        release(run.engine)
        dist.barrier()


def safer_precision(precision: str) -> str | None:
    """The next safer precision that this machine has; None after fp32."""
    for safer in _SAFER.get(precision, ()):
        try:
            return device_and_precision(safer)[1]
        except MachineError:
            continue
    return None


def read_record(path: Path) -> str | None:
    """The precision that an earlier life fell back to; CheckpointError when its record cannot be read."""
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["precision"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it and set --precision") from error


def _changed(config: RunConfig, precision: str) -> RunConfig:
    changed = config.model_copy(deep=True)
    changed.train.precision = precision  # type: ignore[assignment]
    return changed
