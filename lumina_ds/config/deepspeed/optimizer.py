"""The `optimizer` section of the DeepSpeed JSON, and clipping, from an entry of config/optimizers.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lumina_ds.config.deepspeed.tree import AUTO, Merger, section_of, value_at
from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.options import SHORT_OPTIONS
from lumina_ds.config.schema import RunConfig, TrainConfig

_HALF_PRECISION = ("bf16", "fp16")


def merge_optimizer(merger: Merger, config: RunConfig, stage: int, precision: str) -> None:
    """Write optimizer and clipping of the run into a user's file."""
    train = config.train
    optimizer = OPTIMIZERS[train.optimizer]
    _merge_clipping(merger, train, stage, precision)
    kind = section_of(merger.merged, "optimizer").get("type", AUTO)
    same = str(kind).lower() == optimizer.type.lower()
    merger.impose("optimizer.type", kind if same else optimizer.type, "train.optimizer")
    for argument, fields in optimizer.params.items():
        values = [getattr(train, name) for name in fields]
        merger.impose(f"optimizer.params.{argument}", values if len(fields) > 1 else values[0], _owner(fields))
    for argument, value in optimizer.fixed.items():
        merger.impose(f"optimizer.params.{argument}", value, f"--optimizer {train.optimizer}")
    params = merger.merged["optimizer"]["params"]
    for argument, value in optimizer.proposed.items():
        # Of a file that chose DeepSpeed's own Adam, which has no such kernel.
        if argument != "fused" or params.get("torch_adam", True):
            merger.propose(f"optimizer.params.{argument}", value)
    if not optimizer.is_tested and stage > 0:
        merger.impose("zero_allow_untested_optimizer", True, f"--optimizer {train.optimizer}")


def optimizer_faults(train: TrainConfig, json: Mapping[str, Any]) -> list[str]:
    """Why this optimizer cannot run with this stage, offload and machine."""
    stage = value_at(json, "zero_optimization.stage")
    offload = value_at(json, "zero_optimization.offload_optimizer.device", "none")
    obstacle = OPTIMIZERS[train.optimizer].obstacle(stage, offload)
    return [obstacle] if obstacle else []


def _owner(fields: Sequence[str]) -> str:
    """The setting as a user knows it: by its short option, or by its names in the section `train`."""
    flags = {option.field: option.flag for option in SHORT_OPTIONS}
    return flags.get(f"train.{fields[0]}", f"train.{', '.join(fields)}")


def _merge_clipping(merger: Merger, train: TrainConfig, stage: int, precision: str) -> None:
    if not OPTIMIZERS[train.optimizer].clips:
        merger.impose("gradient_clipping", 0.0, f"--optimizer {train.optimizer}, which does not clip")
        return
    merger.impose("gradient_clipping", train.max_grad_norm, "--max-grad-norm")
    if stage == 0 and precision not in _HALF_PRECISION:
        # DeepSpeed reports no gradient norm here, so the trainer clips and must be the only one that does.
        merger.merged["gradient_clipping"] = 0.0
