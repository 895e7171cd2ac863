"""`lumina evaluate`: loss and perplexity of a checkpoint on shards, in one process without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lumina_ds.cli.model_source import evaluation_rows_of, load_run, source_options

EXAMPLE = "Example: lumina evaluate runs/debug --data shards/eval"


@click.command(epilog=EXAMPLE)
@source_options
@click.option("--data", required=True, type=click.Path(path_type=Path), help="folder of preprocessed shards")
@click.option("--seq-length", type=click.IntRange(2), help="tokens of a packed row; the model's context when unset")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="packed rows at a time")
@click.option("--max-rows", type=click.IntRange(1), help="evaluate the first so many rows only")
@click.option("--json", "as_json", is_flag=True, help="one JSON document: step, loss, perplexity, trained_tokens")
def command(
    run: Path,
    inference_precision: str | None,
    data: Path,
    seq_length: int | None,
    batch_size: int,
    max_rows: int | None,
    as_json: bool,
) -> None:
    """Loss and perplexity of RUN (a run folder or one of its step folders) on preprocessed shards."""
    from lumina_ds.engine.world import World
    from lumina_ds.train.evaluate import evaluate

    loaded, manifest = load_run(run, inference_precision)
    rows = evaluation_rows_of(data, loaded, manifest, run, seq_length)
    world = World(0, 0, 1, loaded.device.type)
    result = {"step": manifest["step"], **evaluate(loaded.model, rows, batch_size, world, max_rows)}
    if as_json:
        click.echo(json.dumps(result))
    else:
        at = "" if result["step"] is None else f"step {result['step']}: "
        click.echo(
            f"{at}loss {result['loss']:.4f}, PPL {result['perplexity']:.2f} "
            f"over {result['trained_tokens']:,} trained tokens"
        )
