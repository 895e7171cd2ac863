"""Which checkpoint a run goes on from, and the refusal when it belongs to another model, data or layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lumina_ds.errors import CheckpointError, LuminaError
from lumina_ds.files import file_digest
from lumina_ds.train.checkpoint import find_checkpoint, newest_valid, read_manifest, step_folders

if TYPE_CHECKING:
    from lumina_ds.train.loop import TrainingRun

# Of these, nothing may differ: DeepSpeed loads some mismatches without an error and is silently wrong.
IDENTITY = ("topology", "model", "optimizer", "tokenizer", "data", "schedule")


def run_identity(run: TrainingRun) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes from it; all plain JSON."""
    train = run.config.train
    return {
        "topology": {
            "world_size": run.world.size,
            "zero_stage": run.deepspeed_json["zero_optimization"]["stage"],
            "expert_parallel_size": run.config.deepspeed.expert_parallel_size,
            "precision": run.precision,
        },
        "model": run.config.model.model_dump(),
        "optimizer": {"name": train.optimizer, "weight_decay": train.weight_decay},
        "tokenizer": {"sha256": run.rows.folder.manifest.tokenizer.digest},
        "data": {
            "sha256": file_digest(run.rows.folder.path / "manifest.json"),
            "seq_length": run.config.seq_length,
            "seed": train.seed,
        },
        "schedule": {"rows_per_step": run.batch_rows},
    }


def checkpoint_to_resume(run: TrainingRun) -> Path | None:
    """Rank 0 chooses and checks; every rank gets the choice or the same error. A collective."""
    answer: list[Any] = [None]
    if run.leads:
        try:
            answer[0] = _choose(run)
        except LuminaError as error:
            answer[0] = error
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], LuminaError):
        raise answer[0]
    return answer[0]


def _choose(run: TrainingRun) -> Path | None:
    resume = run.config.run.resume
    if resume == "none":
        if step_folders(run.folder.checkpoints):
            raise CheckpointError(
                f"{run.folder.path} already holds checkpoints and --resume none would mix two runs; "
                "choose another --experiment-name, or --resume auto"
            )
        return None
    chosen = newest_valid(run.folder.checkpoints) if resume == "auto" else find_checkpoint(Path(resume))
    if chosen is not None:
        differences = identity_differences(read_manifest(chosen), run_identity(run))
        if differences:
            raise CheckpointError(f"{chosen} belongs to another run: " + "; ".join(differences))
    return chosen


def identity_differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """`field: saved -> present` for every field of the identity that differs."""
    return [
        f"{section}.{name} was {saved.get(section, {}).get(name)!r}, is now {value!r}"
        for section in IDENTITY
        for name, value in present[section].items()
        if saved.get(section, {}).get(name) != value
    ]
