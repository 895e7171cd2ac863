"""`lumina checkpoint list|verify|consolidate|reshard`: what a run holds, whether it is sound, and other forms of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumina_ds.cli.completers import complete_run
from lumina_ds.errors import CheckpointError, ConfigError
from lumina_ds.text import counted, format_bytes

if TYPE_CHECKING:
    from lumina_ds.checkpoint.format import StepSummary


@click.group(epilog="Example: lumina checkpoint verify runs/debug")
def command() -> None:
    """List, verify, or rewrite the checkpoints of a run."""


@command.command("list", epilog="Example: lumina checkpoint list runs/b1", short_help="steps, sizes, evaluation losses")
@click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_run)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def list_command(run: Path, as_json: bool) -> None:
    """Steps, sizes and evaluation losses of the checkpoints in RUN."""
    from lumina_ds.checkpoint.format import step_folders_in, step_summaries

    summaries = step_summaries(step_folders_in(run))
    if as_json:
        click.echo(json.dumps({"run": str(run), "checkpoints": [_row(summary) for summary in summaries]}))
        return
    for found in summaries:
        marks = "".join(f"  {name}" for name in found.marks)
        if found.num_bytes is None:
            click.echo(f"{found.name}  {found.fault}{marks}")
            continue
        loss = "" if found.eval_loss is None else f"  evaluation loss {found.eval_loss:.4f}"
        click.echo(f"{found.name}  {format_bytes(found.num_bytes)}{loss}{marks}")


def _row(found: StepSummary) -> dict[str, Any]:
    row: dict[str, Any] = {"name": found.name}
    if found.fault:
        row["fault"] = found.fault
    else:
        row |= {"step": found.step, "bytes": found.num_bytes, "eval_loss": found.eval_loss, "topology": found.topology}
    return row | {"latest": "latest" in found.marks, "best": "best" in found.marks}


@command.command(
    "verify", epilog="Example: lumina checkpoint verify runs/b1", short_help="compare every file with its digest"
)
@click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_run)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def verify_command(run: Path, as_json: bool) -> None:
    """Compare every file of every checkpoint in RUN (or of one step folder) with its digest."""
    from lumina_ds.checkpoint.format import checkpoint_faults, step_folders_in

    faults = {folder.name: checkpoint_faults(folder) for folder in step_folders_in(run)}
    if as_json:
        click.echo(json.dumps({"run": str(run), "faults": faults}))
    else:
        for name, found in faults.items():
            click.echo(f"{name}: {'sound' if not found else '; '.join(found)}")
    damaged = [name for name, found in faults.items() if found]
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {counted(len(faults), 'checkpoint')} {'is' if len(damaged) == 1 else 'are'} damaged: {', '.join(damaged)}"
        )


@command.command(
    "consolidate",
    epilog="Example: lumina checkpoint consolidate runs/b1 --out weights --dtype bf16",
    short_help="write the whole weights",
)
@click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_run)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="a folder, or FILE.safetensors")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def consolidate_command(run: Path, out: Path, dtype: str, as_json: bool) -> None:
    """Write the whole weights of RUN's newest sound checkpoint, or of a step folder, from their fp32 state."""
    import torch

    from lumina_ds.checkpoint.consolidate import consolidate
    from lumina_ds.checkpoint.format import find_checkpoint

    folder = find_checkpoint(run)
    num_bytes = consolidate(folder, out, torch.float32 if dtype == "fp32" else torch.bfloat16)
    if as_json:
        click.echo(json.dumps({"checkpoint": str(folder), "out": str(out), "dtype": dtype, "bytes": num_bytes}))
    else:
        click.echo(f"{out}: {format_bytes(num_bytes)} of {dtype} weights of {folder}")


@command.command(
    "reshard",
    epilog="Example: lumina checkpoint reshard runs/b1 --world-size 16 --zero 3 --expert-parallel 8",
    short_help="divide one for other ranks",
)
@click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_run)
@click.option("--world-size", required=True, type=click.IntRange(1), help="number of ranks")
@click.option("--zero", "zero_stage", type=click.IntRange(0, 3), help="ZeRO stage; as saved when not given")
@click.option("--expert-parallel", type=click.IntRange(1), help="ranks that share the experts; as saved when not given")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def reshard_command(
    run: Path, world_size: int, zero_stage: int | None, expert_parallel: int | None, as_json: bool
) -> None:
    """Divide the newest sound checkpoint of RUN for another layout, moments included, in its place.

    Training does this by itself when it resumes; here it is done once, ahead of time, without any rank.
    """
    from lumina_ds.checkpoint.format import find_checkpoint
    from lumina_ds.checkpoint.manifest import read_manifest
    from lumina_ds.checkpoint.reshard import reshard
    from lumina_ds.config.checks import world_faults
    from lumina_ds.train.run_folder import RunFolder

    folder = find_checkpoint(run)
    manifest = read_manifest(folder)
    saved = manifest.topology
    wanted = saved.model_copy(
        update={
            "world_size": world_size,
            "zero_stage": saved.zero_stage if zero_stage is None else zero_stage,
            "expert_parallel_size": expert_parallel or saved.expert_parallel_size,
        }
    )
    config = manifest.run_config()
    config.deepspeed.expert_parallel_size = wanted.expert_parallel_size
    config.deepspeed.zero_stage = wanted.zero_stage
    rows = manifest.schedule.rows_per_step
    accumulation, rest = divmod(rows, config.train.micro_batch_size * world_size)
    if rest:
        raise ConfigError(
            f"a step of this run has {counted(rows, 'row')}, which {counted(world_size, 'rank')} cannot "
            f"share with --batch-size {config.train.micro_batch_size}; use another --world-size"
        )
    config.train.gradient_accumulation_steps = accumulation
    faults = world_faults(config, world_size)
    if faults:
        raise ConfigError.from_faults(faults)
    lock = RunFolder(folder.parents[1])
    lock.lock()
    try:
        reshard(folder, wanted)
    finally:
        lock.release()
    if as_json:
        topologies = {"was": saved.model_dump(), "topology": wanted.model_dump()}
        click.echo(json.dumps({"checkpoint": str(folder), **topologies}))
        return
    click.echo(
        f"{folder} is divided for {counted(world_size, 'rank')}; go on with --zero "
        f"{wanted.zero_stage} --expert-parallel {wanted.expert_parallel_size} --batch-size "
        f"{config.train.micro_batch_size} --grad-accum {accumulation}"
    )
