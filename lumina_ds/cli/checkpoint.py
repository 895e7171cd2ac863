"""`lumina checkpoint list|verify`: what checkpoints a run holds, and whether they are sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lumina_ds.errors import CheckpointError


@click.group(epilog="Example: lumina checkpoint verify runs/debug")
def command() -> None:
    """List or verify the checkpoints of a run."""


@command.command("list")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def list_command(run: Path, as_json: bool) -> None:
    """Steps, sizes and evaluation losses of the checkpoints in RUN."""
    from lumina_ds.train.checkpoint import pointer_target, read_manifest

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
        click.echo(f"{row['name']}  {row['bytes'] / 2**20:.1f} MiB{loss}{marks}")


@command.command("verify")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def verify_command(run: Path, as_json: bool) -> None:
    """Compare every file of every checkpoint in RUN (or of one step folder) with its digest."""
    from lumina_ds.train.checkpoint import checkpoint_faults

    faults = {folder.name: checkpoint_faults(folder) for folder in _folders(run)}
    if as_json:
        click.echo(json.dumps({"run": str(run), "faults": faults}))
    else:
        for name, found in faults.items():
            click.echo(f"{name}: {'sound' if not found else '; '.join(found)}")
    damaged = [name for name, found in faults.items() if found]
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(faults)} checkpoints are damaged: {', '.join(damaged)}")


def _folders(run: Path) -> list[Path]:
    from lumina_ds.train.checkpoint import STEP_NAME, step_folders

    folders = [run] if STEP_NAME.fullmatch(run.name) and run.is_dir() else step_folders(run / "checkpoints")
    if not folders:
        raise CheckpointError(f"{run} holds no checkpoint; give a run folder or one of its step folders")
    return folders
