"""`lumina bench train`: speed and memory of training, of one or several configurations side by side."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import click

from lumina_ds.cli.config_options import ConfigCommand, complete_config, resolve
from lumina_ds.config.schema import RunConfig
from lumina_ds.text import counted, format_bytes

EXAMPLES = """Examples:

\b
  lumina bench train --config debug --steps 20 -- --num_gpus 2
  lumina bench train --config debug --config m70_memory --batch-size 4 --json
  lumina bench train --config b1 --data shards/train --variant "--zero 1" --variant "--zero 2 --batch-size 8"
"""
REASONS = {3: "data", 4: "environment", 6: "out of memory", 7: "unstable"}


@click.command(
    "train", cls=ConfigCommand, epilog=EXAMPLES, short_help="speed and memory of configurations, side by side"
)
@click.option(
    "--config",
    "sources",
    multiple=True,
    metavar="PRESET|FILE",
    help="preset or YAML file; may be repeated",
    shell_complete=complete_config,
)
@click.option(
    "--variant", "variants", multiple=True, metavar="OPTIONS", help="a row with these options of lumina train"
)
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="measured steps")
@click.option("--warmup", type=click.IntRange(min=0), default=3, show_default=True, help="steps before them")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
@click.pass_context
def train(
    ctx: click.Context, sources: tuple[str, ...], variants: tuple[str, ...], steps: int, warmup: int, as_json: bool
) -> int:
    """Train some steps of each --config with each --variant: tokens per second, MFU, step time, memory.

    Takes every option of lumina train, --data among them; without it rows are random tokens. Nothing is written.
    """
    runner: list[str] = ctx.meta["runner_arguments"]
    if not sources:
        raise click.UsageError("--config is missing; give a preset or a YAML file")
    rows = [
        (" ".join(filter(None, (source, variant))), _configuration(source, [*ctx.args, *_words(variant)]))
        for source in sources
        for variant in variants or ("",)
    ]
    from lumina_ds.ranks.ask import Question, ask_ranks
    from lumina_ds.ranks.check_run import check_measurable

    for _, config in rows:
        check_measurable(config, runner)
    results: list[dict[str, Any]] = []
    for label, config in rows:
        if len(rows) > 1:
            click.echo(f"{label} ...", err=True)
        counts = {"num_steps": steps, "num_warmup": warmup}
        # Each on ranks of its own: one that fails takes no other with it, and none inherits another's memory.
        result, code = ask_ranks(Question("lumina_ds.measure.throughput.measure_throughput", counts, config), runner)
        results.append({"name": label, "exit_code": code, **(result or {})})
    if all(result["exit_code"] for result in results):
        return int(results[0]["exit_code"])  # whose ranks have said why
    if as_json:
        click.echo(json.dumps({"results": results}))
    else:
        _print(results)
    return 0


def _words(variant: str) -> list[str]:
    try:
        return shlex.split(variant)
    except ValueError as error:
        raise click.UsageError(f"--variant {variant} cannot be cut into options: {error}") from error


def _configuration(source: str, words: Sequence[str]) -> RunConfig:
    """What `lumina train` makes of these options."""
    from lumina_ds.cli.train import command

    return resolve(command.make_context("lumina train", ["--config", source, *words])).config


def _print(results: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    measured = [result for result in results if result["exit_code"] == 0]
    first = measured[0]
    console = Console(highlight=False)
    console.print(
        f"{first['world_size']} x {first['device']}, {counted(first['steps'], 'step')} after {first['warmup_steps']}, MFU against "
        f"{first['peak_flops'] / 1e12:,.3g} TFLOP/s a rank: {first['peak_flops_of']}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "tokens/s", "MFU", "step, ms", "p10 to p90", "data", "peak memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, result in enumerate(results, 1):
        console.print(f"{number}  {result['name']}{_setting(result)}", soft_wrap=True)
        if result["exit_code"] == 0:
            table.add_row(str(number), *_cells(result))
    console.print(table)


def _setting(result: dict[str, Any]) -> str:
    if code := result["exit_code"]:
        return f": failed, {REASONS.get(code, 'exit code')} ({code})"
    return (
        f": ZeRO-{result['zero_stage']} EP{result['expert_parallel_size']} {result['precision']}, "
        f"{counted(result['micro_batch_size'], 'row')} x {result['gradient_accumulation_steps']} x {result['seq_length']} "
        f"of {result['data']}"
    )


def _cells(result: dict[str, Any]) -> list[str]:
    seconds = result["step_seconds"]
    return [
        f"{result['tokens_per_second']:,.0f}",
        f"{100 * result['mfu']:.1f} %",
        f"{1000 * seconds['median']:,.1f}",
        f"{1000 * seconds['p10']:,.1f} to {1000 * seconds['p90']:,.1f}",
        f"{100 * result['data_share']:.1f} %",
        format_bytes(result["peak_bytes"]),
    ]
