"""Which checkpoint a run goes on from, and the refusal when it belongs to another model, data or layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumina_ds.checkpoint.format import find_checkpoint, newest_valid, set_aside_later_steps, step_folders
from lumina_ds.checkpoint.manifest import (
    Digest,
    Manifest,
    RunIdentity,
    SavedData,
    SavedOptimizer,
    Schedule,
    Topology,
    read_manifest,
)
from lumina_ds.checkpoint.publish import restore_replaced
from lumina_ds.config.schema import ModelConfig, RunConfig, ZeroStage
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.mixture.order import MIXTURE_VERSION
from lumina_ds.data.mixture.rows import MixedRows
from lumina_ds.data.sampler import ORDER_VERSION
from lumina_ds.engine.world import World, on_rank_0
from lumina_ds.errors import CheckpointError
from lumina_ds.text import counted
from lumina_ds.train.run_folder import RunFolder

# Of these, nothing may differ but the layout, for which the state is divided anew, and the precision: weights and
# moments are saved in fp32 whatever it is.
IDENTITY = tuple(RunIdentity.model_fields)
LAYOUT = tuple(f"topology.{name}" for name in Topology.model_fields)


def run_identity(
    config: RunConfig,
    world_size: int,
    zero_stage: ZeroStage,
    precision: str,
    rows: PackedRows | MixedRows,
    rows_per_step: int,
) -> RunIdentity:
    """What a checkpoint must share with the run that resumes from it."""
    train, made = config.train, rows.folder.manifest
    return RunIdentity(
        topology=Topology(
            world_size=world_size,
            zero_stage=zero_stage,
            expert_parallel_size=config.deepspeed.expert_parallel_size,
            precision=precision,
        ),
        model=config.model.model_dump(),
        optimizer=SavedOptimizer(
            name=train.optimizer,
            weight_decay=train.weight_decay,
            betas=[train.adam_beta1, train.adam_beta2],
            epsilon=train.adam_epsilon,
        ),
        tokenizer=Digest(sha256=made.tokenizer.digest),
        template=Digest(sha256=made.template.digest),
        data=SavedData(
            sha256=rows.digest,
            seq_length=config.seq_length,
            seed=train.seed,
            order=f"{ORDER_VERSION} {MIXTURE_VERSION}" if isinstance(rows, MixedRows) else ORDER_VERSION,
        ),
        schedule=Schedule(rows_per_step=rows_per_step),
    )


def checkpoint_to_resume(
    folder: RunFolder,
    resume: str,
    present: RunIdentity,
    world: World,
    check_room: Callable[[int], None],
    sources: Sequence[str] = (),
) -> Path | None:
    """Rank 0 takes the run folder, chooses and checks; every rank gets the choice or the same error. A collective.

    `resume` is the setting run.resume; `check_room(step)` refuses to train on from `step` without room on the disk;
    `sources` are the names of a mixture's.
    """

    def choose() -> Path | None:
        folder.create()
        folder.lock()
        restore_replaced(folder.checkpoints)
        chosen = _choose(folder, resume, present, sources)
        check_room(0 if chosen is None else read_manifest(chosen).step)
        return chosen

    return on_rank_0(world, choose)


def _choose(folder: RunFolder, resume: str, present: RunIdentity, sources: Sequence[str]) -> Path | None:
    if resume == "none":
        if step_folders(folder.checkpoints):
            raise CheckpointError(
                f"{folder.path} already holds checkpoints and --resume none would mix two runs; "
                "choose another --experiment-name, or --resume auto"
            )
        return None
    chosen = newest_valid(folder.checkpoints) if resume in ("auto", "must") else find_checkpoint(Path(resume))
    if chosen is None and resume == "must":
        raise nothing_to_resume(folder)
    if chosen is not None:
        saved = read_manifest(chosen)
        _refuse_other_sources(chosen, saved, sources)
        refuse_another_run(chosen, saved, present)
        if chosen.parent.resolve() == folder.checkpoints.resolve():
            set_aside_later_steps(chosen.parent, saved.step)
    return chosen


def _refuse_other_sources(folder: Path, saved: Manifest, sources: Sequence[str]) -> None:
    """Rows are numbered by their sources: neither one more nor one less goes on with the order that was begun."""
    before = [] if saved.mixture is None else sorted(saved.mixture.reached.rows)
    if before != sorted(sources):
        was, now = (", ".join(names) or "no names" for names in (before, sorted(sources)))
        raise CheckpointError(
            f"{folder} is of the sources {was}, and the run has {now}; keep them (one with weight 0 is not trained), or begin "
            f"a run of another --experiment-name with --train.init_from {folder}"
        )


def check_resume(folder: RunFolder, resume: str) -> None:
    """Refuse early, before data are prepared and ranks are started, what cannot be resumed; CheckpointError."""
    if resume == "must" and not any(folder.checkpoints.glob("*")):
        raise nothing_to_resume(folder)
    if resume not in ("auto", "must", "none") and not Path(resume).is_dir():
        raise CheckpointError(
            f"{resume} is neither a run folder nor a checkpoint (step-XXXXXXXX); give --resume one of them"
        )


def nothing_to_resume(folder: RunFolder) -> CheckpointError:
    """What --resume must ends with."""
    return CheckpointError(
        f"--resume must, and {folder.checkpoints} holds no checkpoint; check --runs-dir and --experiment-name, "
        "or start anew with --resume auto"
    )


def refuse_another_run(folder: Path, saved: RunIdentity, present: RunIdentity) -> None:
    """Raise CheckpointError, field by field, when a checkpoint is not of the `present` run; the layout may differ."""
    differences = [
        difference for difference in identity_differences(saved, present) if not difference.startswith(LAYOUT)
    ]
    if not differences:
        return
    remedy = "go back to these settings, or start anew under another --experiment-name"
    if [difference.split(" ")[0] for difference in differences] == ["schedule.rows_per_step"]:
        rows, world_size = saved.schedule.rows_per_step, present.topology.world_size
        remedy = f"keep --batch-size x --grad-accum x {counted(world_size, 'rank')} at {rows}, so that every row is seen once"
    raise CheckpointError(f"{folder} belongs to another run: {'; '.join(differences)}; {remedy}")


def layout_changes(saved: RunIdentity, present: RunIdentity) -> list[str]:
    """`field: saved -> present` for a resume under another world size, ZeRO stage, expert-parallel size or precision."""
    return [difference for difference in identity_differences(saved, present) if difference.startswith(LAYOUT)]


def changed_settings(saved: Manifest, config: RunConfig) -> list[str]:
    """`train.NAME: saved -> present` for settings that may change between lives of a run, and did."""
    before, present = saved.config.train, config.train.model_dump()
    return [
        f"train.{name} {before.get(name)} -> {value}"
        for name, value in present.items()
        if name not in ("stop_at_step", "compile") and before.get(name) != value
    ]


def identity_differences(saved: RunIdentity, present: RunIdentity) -> list[str]:
    """`field: saved -> present` for every field of the identity that differs."""
    before, now = saved.model_dump(), present.model_dump()
    before["model"] = _with_later_fields(before["model"])
    return [
        f"{section}.{name} was {_short(before[section].get(name))}, is now {_short(value)}"
        for section in IDENTITY
        for name, value in now[section].items()
        if before[section].get(name) != value
    ]


def _with_later_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model saved before some field existed was what the field's default makes."""
    defaults = {name: field.get_default(call_default_factory=True) for name, field in ModelConfig.model_fields.items()}
    return {**defaults, **model}


def _short(value: Any) -> str:
    """A value for a message; of a digest its beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)
