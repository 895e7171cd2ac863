"""`lumina bench`: what training and the loader give and what precisions of inference cost, on this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lumina_ds.cli.bench.train import train
from lumina_ds.text import counted, format_bytes

if TYPE_CHECKING:
    from lumina_ds.measure.loader import LoaderSpeed
    from lumina_ds.measure.precisions import PrecisionResult


@click.group()
def command() -> None:
    """Measure a part of the program on this machine."""


command.add_command(train)


@command.command(
    epilog="Example: lumina bench loader shards/train --batch-size 8", short_help="how fast shards are read"
)
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
    from lumina_ds.measure.loader import measure_loader

    speed = measure_loader(folder, seq_length, batch_size, seconds, force_streaming)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **dataclasses.asdict(speed)}, ensure_ascii=False))
    else:
        _print_speed(folder, speed)


@command.command(
    epilog="Example: lumina bench precision runs/debug --data shards/eval",
    short_help="what each precision of inference costs and gives",
)
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder of preprocessed shards.")
@click.option("--max-rows", type=click.IntRange(min=1), default=64, show_default=True, help="Packed rows to read.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def precision(run: Path, data: Path, max_rows: int, max_new_tokens: int, as_json: bool) -> None:
    """Memory, speed and perplexity of RUN's model in fp32, fp16, bf16 and int8 (dynamic)."""
    from lumina_ds.cli.model_source import evaluation_rows_of, load_run
    from lumina_ds.measure.precisions import compare_precisions

    _, manifest = load_run(run, "fp32")
    results = compare_precisions(
        lambda name: load_run(run, name)[0],
        lambda loaded: evaluation_rows_of(data, loaded, manifest, run),
        max_rows=max_rows,
        num_new_tokens=max_new_tokens,
    )
    if as_json:
        found = [dataclasses.asdict(result) for result in results]
        click.echo(json.dumps({"run": str(run), "step": manifest["step"], "precisions": found}))
    else:
        _print_precisions(results)


def _print_precisions(results: Iterable[PrecisionResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table, notes = Table(box=None, pad_edge=False), []
    for column in ("precision", "weights", "peak", "reading", "writing", "loss", "perplexity", "against fp32"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for result in results:
        if result.missing is not None:
            notes.append(f"{result.precision} is left out: {result.missing}")
            continue
        table.add_row(
            result.precision,
            format_bytes(result.weight_bytes or 0),
            "-" if result.peak_bytes is None else format_bytes(result.peak_bytes),
            f"{result.reading_tokens_per_second:,.0f} tok/s",
            f"{result.writing_tokens_per_second:,.1f} tok/s",
            f"{result.loss:.4f}",
            f"{result.perplexity:,.3f}",
            f"{100 * (result.perplexity_change or 0):+.3f} %",
        )
    Console(width=120).print(table)
    for note in notes:
        click.echo(note)


def _print_speed(folder: Path, speed: LoaderSpeed) -> None:
    click.echo(
        f"{folder}: {counted(speed.num_documents, 'conversation')}, {counted(speed.num_tokens, 'token')}, "
        f"{counted(speed.num_rows, 'row')} of {speed.seq_length}, {format_bytes(speed.shard_bytes)}, read as {speed.mode}\n"
        f"start-up   {speed.startup_seconds:.3f} s (shards {speed.open_seconds:.3f}, packing plan "
        f"{speed.plan_seconds:.3f}, first micro-batch {speed.first_batch_seconds:.3f})\n"
        f"reading    {speed.rows_per_second:,.0f} rows/s, {speed.tokens_per_second / 1e6:.1f} M tokens/s, "
        f"{speed.tokens_per_second_per_core / 1e6:.1f} M tokens/s per core "
        f"(micro-batches of {counted(speed.batch_size, 'row')}, {speed.measured_seconds:.1f} s)\n"
        f"memory     {format_bytes(speed.memory_bytes)} of its own, {format_bytes(speed.mapped_bytes)} of mapped files"
    )
