"""`lumina checkpoint list|verify|consolidate|reshard`: what a run holds, whether it is sound, and other forms of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lumina_ds.errors import CheckpointError, ConfigError
from lumina_ds.text import counted, format_bytes


@click.group(epilog="Example: lumina checkpoint verify runs/debug")
def command() -> None:
    """List, verify, or rewrite the checkpoints of a run."""


@command.command("list", epilog="Example: lumina checkpoint list runs/b1", short_help="steps, sizes, evaluation losses")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def list_command(run: Path, as_json: bool) -> None:
    """Steps, sizes and evaluation losses of the checkpoints in RUN."""
    from lumina_ds.checkpoint.format import pointer_target, read_manifest

    latest, best = (pointer_target(run / "checkpoints", name) for name in ("latest", "best"))
    rows: list[dict[str, Any]] = []
    for folder in _folders(run):
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            rows.append({"name": folder.name, "fault": str(error), "latest": folder == latest, "best": folder == best})
            continue
        rows.append(
            {
                "name": folder.name,
                "step": manifest["step"],
                "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
                "eval_loss": manifest["eval_loss"],
                "topology": manifest["topology"],
                "latest": folder == latest,
                "best": folder == best,
            }
        )
    if as_json:
        click.echo(json.dumps({"run": str(run), "checkpoints": rows}))
        return
    for row in rows:
        marks = "".join(f"  {name}" for name in ("latest", "best") if row[name])
        if "fault" in row:
            click.echo(f"{row['name']}  {row['fault']}{marks}")
            continue
        loss = "" if row["eval_loss"] is None else f"  evaluation loss {row['eval_loss']:.4f}"
        click.echo(f"{row['name']}  {format_bytes(row['bytes'])}{loss}{marks}")


@command.command(
    "verify", epilog="Example: lumina checkpoint verify runs/b1", short_help="compare every file with its digest"
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def verify_command(run: Path, as_json: bool) -> None:
    """Compare every file of every checkpoint in RUN (or of one step folder) with its digest."""
    from lumina_ds.checkpoint.format import checkpoint_faults

    faults = {folder.name: checkpoint_faults(folder) for folder in _folders(run)}
    if as_json:
        click.echo(json.dumps({"run": str(run), "faults": faults}))
    else:
        for name, found in faults.items():
            click.echo(f"{name}: {'sound' if not found else '; '.join(found)}")
    damaged = [name for name, found in faults.items() if found]
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(faults)} checkpoints are damaged: {', '.join(damaged)}")


@command.command(
    "consolidate",
    epilog="Example: lumina checkpoint consolidate runs/b1 --out weights --dtype bf16",
    short_help="write the whole weights",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="a folder, or FILE.safetensors")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def consolidate_command(run: Path, out: Path, dtype: str, as_json: bool) -> None:
    """Write the whole weights of RUN's newest sound checkpoint, or of a step folder, from their fp32 state."""
    import torch

    from lumina_ds.checkpoint.format import find_checkpoint
    from lumina_ds.checkpoint.reshard import consolidate

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
@click.argument("run", type=click.Path(path_type=Path))
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
    from lumina_ds.checkpoint.format import find_checkpoint, read_manifest
    from lumina_ds.checkpoint.reshard import reshard
    from lumina_ds.config.checks import world_faults
    from lumina_ds.config.schema import RunConfig
    from lumina_ds.train.run_folder import RunFolder

    folder = find_checkpoint(run)
    manifest = read_manifest(folder)
    saved = manifest["topology"]
    wanted: dict[str, Any] = {
        "world_size": world_size,
        "zero_stage": saved["zero_stage"] if zero_stage is None else zero_stage,
        "expert_parallel_size": expert_parallel or saved["expert_parallel_size"],
    }
    config = RunConfig.model_validate(manifest["config"])
    config.deepspeed.expert_parallel_size = wanted["expert_parallel_size"]
    config.deepspeed.zero_stage = wanted["zero_stage"]
    per_pass = config.train.micro_batch_size * world_size
    accumulation, rest = divmod(manifest["schedule"]["rows_per_step"], per_pass)
    if rest:
        raise ConfigError(
            f"a step of this run has {manifest['schedule']['rows_per_step']} rows, which {world_size} ranks cannot "
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
        click.echo(json.dumps({"checkpoint": str(folder), "was": saved, "topology": saved | wanted}))
        return
    click.echo(
        f"{folder} is divided for {counted(world_size, 'rank')}; go on with --zero {wanted['zero_stage']} --expert-parallel "
        f"{wanted['expert_parallel_size']} --batch-size {config.train.micro_batch_size} --grad-accum {accumulation}"
    )


def _folders(run: Path) -> list[Path]:
    from lumina_ds.checkpoint.format import STEP_NAME, step_folders

    folders = [run] if STEP_NAME.fullmatch(run.name) and run.is_dir() else step_folders(run / "checkpoints")
    if not folders:
        raise CheckpointError(f"{run} holds no checkpoint; give a run folder or one of its step folders")
    return folders
