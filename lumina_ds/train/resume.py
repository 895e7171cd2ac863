"""Which checkpoint a run goes on from, and the refusal when it belongs to another model, data or layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lumina_ds.checkpoint.format import (
    find_checkpoint,
    newest_valid,
    read_manifest,
    set_aside_later_steps,
    step_folders,
)
from lumina_ds.checkpoint.publish import restore_replaced
from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.data.sampler import ORDER_VERSION
from lumina_ds.errors import CheckpointError, LuminaError
from lumina_ds.files import file_digest
from lumina_ds.plan.duration import checkpoint_bytes
from lumina_ds.train.disk_space import check_disk_space

if TYPE_CHECKING:
    from lumina_ds.train.run import TrainingRun

# Of these, nothing may differ but the layout, for which the state is divided anew, and the precision: weights and
# moments are saved in fp32 whatever it is.
IDENTITY = ("topology", "model", "optimizer", "tokenizer", "template", "data", "schedule")
LAYOUT = tuple(f"topology.{name}" for name in ("world_size", "zero_stage", "expert_parallel_size", "precision"))


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
        "optimizer": {
            "name": train.optimizer,
            "weight_decay": train.weight_decay,
            "betas": [train.adam_beta1, train.adam_beta2],
            "epsilon": train.adam_epsilon,
        },
        "tokenizer": {"sha256": run.rows.folder.manifest.tokenizer.digest},
        "template": {"sha256": run.rows.folder.manifest.template.digest},
        "data": {
            "sha256": file_digest(run.rows.folder.path / "manifest.json"),
            "seq_length": run.config.seq_length,
            "seed": train.seed,
            "order": ORDER_VERSION,
        },
        "schedule": {"rows_per_step": run.batch_rows},
    }


def checkpoint_to_resume(run: TrainingRun) -> Path | None:
    """Rank 0 takes the run folder, chooses and checks; every rank gets the choice or the same error. A collective."""
    answer: list[Any] = [None]
    if run.leads:
        try:
            run.folder.create()
            run.folder.lock()
            restore_replaced(run.folder.checkpoints)
            answer[0] = _choose(run)
            step = 0 if answer[0] is None else read_manifest(answer[0])["step"]
            num_bytes = checkpoint_bytes(run.config, run.precision).total
            check_disk_space(run.folder.checkpoints, run.config.train, num_bytes, run.last_step - step)
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
        refuse_another_run(chosen, read_manifest(chosen), run_identity(run))
        if chosen.parent.resolve() == run.folder.checkpoints.resolve():
            set_aside_later_steps(chosen.parent, read_manifest(chosen)["step"])
    return chosen


def refuse_another_run(folder: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise CheckpointError, field by field, when a checkpoint is not of the `present` run; the layout may differ."""
    differences = [
        difference for difference in identity_differences(saved, present) if not difference.startswith(LAYOUT)
    ]
    if not differences:
        return
    remedy = "go back to these settings, or start anew under another --experiment-name"
    if [difference.split(" ")[0] for difference in differences] == ["schedule.rows_per_step"]:
        rows, world_size = saved["schedule"]["rows_per_step"], present["topology"]["world_size"]
        remedy = f"keep --batch-size x --grad-accum x {world_size} ranks at {rows}, so that every row is seen once"
    raise CheckpointError(f"{folder} belongs to another run: {'; '.join(differences)}; {remedy}")


def layout_changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """`field: saved -> present` for a resume under another world size, ZeRO stage, expert-parallel size or precision."""
    return [difference for difference in identity_differences(saved, present) if difference.startswith(LAYOUT)]


def changed_settings(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """`train.NAME: saved -> present` for settings that may change between lives of a run, and did."""
    present = config.train.model_dump()
    return [
        f"train.{name} {saved['config']['train'].get(name)} -> {value}"
        for name, value in present.items()
        if name not in ("stop_at_step", "compile") and saved["config"]["train"].get(name) != value
    ]


def identity_differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """`field: saved -> present` for every field of the identity that differs."""
    saved = _with_later_fields(saved)
    return [
        f"{section}.{name} was {_short(saved.get(section, {}).get(name))}, is now {_short(value)}"
        for section in IDENTITY
        for name, value in present[section].items()
        if saved.get(section, {}).get(name) != value
    ]


def _with_later_fields(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model saved before some field existed was what the field's default makes."""
    if "model" not in saved:
        return saved
    defaults = {name: field.get_default(call_default_factory=True) for name, field in ModelConfig.model_fields.items()}
    return {**saved, "model": defaults | saved["model"]}


def _short(value: Any) -> str:
    """A value for a message; of a digest its beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)
