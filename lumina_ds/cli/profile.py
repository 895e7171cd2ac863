"""`lumina profile`: where the time and the memory of a training step go."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.config_options import ConfigCommand, config_options, resolve
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.text import counted, format_bytes

EXAMPLES = """Examples:

\b
  lumina profile --config debug -- --num_gpus 2
  lumina profile --config b1 --data shards/train --zero 2 --trace trace.json
"""
COLUMNS = ("forward", "backward", "optimizer", "between")


@click.command(cls=ConfigCommand, epilog=EXAMPLES)
@config_options
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="measured steps")
@click.option("--warmup", type=click.IntRange(min=1), default=2, show_default=True, help="steps before them")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="write a trace for chrome://tracing")
@click.option(
    "--memory-snapshot", type=click.Path(path_type=Path, dir_okay=False), help="write torch's snapshot (on a GPU)"
)
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
@click.pass_context
def command(
    ctx: click.Context,
    steps: int,
    warmup: int,
    trace: Path | None,
    memory_snapshot: Path | None,
    as_json: bool,
    **_: Any,
) -> int:
    """Train some steps and say where their time and memory go, by part; nothing else is written.

    Takes every option of lumina train. Without --data rows are random tokens; with it, reading is measured too.
    """
    from lumina_ds.ranks.ask import Question, ask_ranks
    from lumina_ds.ranks.check_run import check_measurable

    config = resolve(ctx).config
    files = {"trace": _writable(trace, "--trace"), "snapshot": _writable(memory_snapshot, "--memory-snapshot")}
    runner: list[str] = ctx.meta["runner_arguments"]
    device = check_measurable(config, runner)
    if memory_snapshot is not None and device != "cuda":
        raise MachineError("--memory-snapshot needs a CUDA GPU: it is a record of its allocator; leave it out here")
    arguments = {"num_steps": steps, "num_warmup": warmup, **files}
    result, code = ask_ranks(Question("lumina_ds.measure.profile.profile_steps", arguments, config), runner)
    if result is None:
        return code  # the ranks have said why
    if config.data.shards is not None:
        from lumina_ds.measure.loader import measure_loader

        batch, streaming = config.train.micro_batch_size, config.data.force_streaming
        speed = measure_loader(Path(config.data.shards), config.seq_length, batch, 1, streaming)
        result["loader"] = dataclasses.asdict(speed)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result, [Path(path) for path in files.values() if path is not None])
    return 0


def _writable(path: Path | None, option: str) -> str | None:
    """The absolute path, for ranks in any folder; ConfigError where no file can be written."""
    if path is None:
        return None
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}; name another file") from error
    return str(path.resolve())


def _print(result: dict[str, Any], files: list[Path]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    plain, profiled = 1000 * result["step_seconds"], 1000 * result["profiled_step_seconds"]
    console.print(
        f"rank 0 of {result['world_size']} on {result['device']}, ZeRO-{result['zero_stage']} "
        f"EP{result['expert_parallel_size']} {result['precision']}, {counted(result['steps'], 'step')}: "
        f"{plain:,.1f} ms a step, {profiled:,.1f} ms under the profiler\n",
        soft_wrap=True,
    )
    console.print(_time_table(result))
    if result["world_size"] > 1:
        console.print("communication includes waiting for other ranks")
    console.print()
    console.print(_memory_table(result["memory"]))
    loader = result.get("loader")
    if loader:
        console.print(
            f"\ndata: waited {1000 * result['data_seconds']:,.2f} ms a step; one thread reads "
            f"{loader['tokens_per_second'] / 1e6:,.1f} M tokens/s ({loader['mode']}, start-up "
            f"{loader['startup_seconds']:.2f} s)",
            soft_wrap=True,
        )
    for path in files:
        console.print(f"written: {path}", soft_wrap=True)


def _time_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    spent = {(row["phase"], row["part"]): row["seconds"] for row in result["time"]}
    total = sum(spent.values())
    parts = list(dict.fromkeys(row["part"] for row in result["time"]))
    by_part = {part: sum(seconds for (_, name), seconds in spent.items() if name == part) for part in parts}
    columns = [phase for phase in COLUMNS if any(phase == each for each, _ in spent)]
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
    table.add_column("time, ms a step", footer="all", no_wrap=True)
    for phase in columns:
        in_phase = sum(seconds for (each, _), seconds in spent.items() if each == phase)
        table.add_column(phase, justify="right", no_wrap=True, footer=_milliseconds(in_phase))
    table.add_column("all", justify="right", footer=_milliseconds(total))
    table.add_column("share", justify="right", footer="100 %")
    for part in sorted(parts, key=lambda part: -by_part[part]):
        cells = [_milliseconds(spent.get((phase, part), 0.0)) for phase in columns]
        share = f"{100 * by_part[part] / total:.1f} %"
        table.add_row(part, *cells, _milliseconds(by_part[part]), share)
    return table


def _memory_table(memory: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory of rank 0", no_wrap=True)
    table.add_column("live tensors", justify="right")
    table.add_column(memory["measure"], justify="right")
    for name, size in memory["components"].items():
        table.add_row(name, format_bytes(size))
    for phase, size in memory["peak_by_phase"].items():
        table.add_row(f"peak in {phase}", "", format_bytes(size))
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}" if seconds else ""
