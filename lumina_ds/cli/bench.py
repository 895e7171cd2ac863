"""`lumina bench loader`: what a shard folder gives, in tokens per second, on this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lumina_ds.data.loader_speed import LoaderSpeed


@click.group()
def command() -> None:
    """Measure a part of the program on this machine."""


@command.command(epilog="Example: lumina bench loader shards/train --batch-size 8")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--seq-length", type=click.IntRange(min=2), help="Row length; the folder's own when unset.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of a micro-batch.")
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=3, show_default=True, help="How long to read, after the start."
)
@click.option("--force-streaming", is_flag=True, help="Read as a folder above 10 GB is read.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def loader(
    folder: Path, seq_length: int | None, batch_size: int, seconds: float, force_streaming: bool, as_json: bool
) -> None:
    """Open DIR and gather shuffled rows as training does, in one thread: start-up time, rows/s, tokens/s, memory."""
    from lumina_ds.data.loader_speed import measure_loader

    speed = measure_loader(folder, seq_length, batch_size, seconds, force_streaming)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **dataclasses.asdict(speed)}, ensure_ascii=False))
    else:
        _print_speed(folder, speed)


def _print_speed(folder: Path, speed: LoaderSpeed) -> None:
    click.echo(
        f"{folder}: {speed.num_documents:,} conversations, {speed.num_tokens:,} tokens, "
        f"{speed.num_rows:,} rows of {speed.seq_length}, {_megabytes(speed.shard_bytes)}, read as {speed.mode}\n"
        f"start-up   {speed.startup_seconds:.3f} s (shards {speed.open_seconds:.3f}, packing plan "
        f"{speed.plan_seconds:.3f}, first micro-batch {speed.first_batch_seconds:.3f})\n"
        f"reading    {speed.rows_per_second:,.0f} rows/s, {speed.tokens_per_second / 1e6:.1f} M tokens/s, "
        f"{speed.tokens_per_second_per_core / 1e6:.1f} M tokens/s per core "
        f"(micro-batches of {speed.batch_size} rows, {speed.measured_seconds:.1f} s)\n"
        f"memory     {_megabytes(speed.memory_bytes)} of its own, {_megabytes(speed.mapped_bytes)} of mapped files"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
