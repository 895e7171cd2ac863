"""`lumina plan check`: a DeepSpeed JSON judged before anything starts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from lumina_ds.config.deepspeed.report import DeepSpeedReport, report_on_file, report_on_run
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.precision import PRECISIONS, resolve_precision
from lumina_ds.config.tensors import num_parameters
from lumina_ds.errors import ConfigError
from lumina_ds.text import counted


@click.command(
    "check", epilog="Example: lumina plan check ds.json --config b7 --gpus 8", short_help="check a DeepSpeed JSON"
)
@click.argument("file")
@click.option("--config", "source", help="A preset or YAML file: judge the JSON together with this run.")
@click.option("--gpus", type=click.IntRange(min=1), help="Ranks, for the batch equation; 1 with --config.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="With --config: of the run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def check(file: str, source: str | None, gpus: int | None, precision: str | None, as_json: bool) -> None:
    """Check a DeepSpeed JSON: FILE, or the name of a shipped one such as zero2.

    Unknown keys at every depth with the nearest name, wrong values, "auto" resolved, the batch equation, and
    combinations that DeepSpeed refuses or handles wrongly. Exit code 2 with any fault.
    """
    if source is None:
        if precision is not None:
            raise click.UsageError("--precision goes with --config; a file by itself names its own")
        report = report_on_file(file, gpus)
    else:
        # As an override, so that a preset's own stage gives way to the file's.
        config = load_config(source, [Override("deepspeed.config", file, "FILE")]).config
        asked = precision or config.train.precision
        resolved, _ = resolve_precision(asked, "cuda", True, num_parameters(config.model))
        report = report_on_run(config, gpus or 1, resolved)
    if as_json:
        click.echo(json.dumps({"file": file, "ok": not report.faults, **asdict(report)}, indent=2))
    else:
        _print(file, report)
    if report.faults:
        count = len(report.faults)
        raise ConfigError(f"{file} has {counted(count, 'fault')}; nothing was started")


def _print(file: str, report: DeepSpeedReport) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    for fault in report.faults:
        console.print(f"✖ {fault}")
    for warning in report.warnings:
        console.print(f"! {warning}")
    for path, value in report.auto.items():
        console.print(f'  {path}: "auto" -> {value}')
    if report.batch:
        console.print(f"  {report.batch}")
    if not report.faults:
        console.print(f"✔ {file} can be used")
