"""`lumina selftest`: whether every layout trains the same on this machine."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumina_ds.errors import ConfigError, UnstableError
from lumina_ds.text import counted

if TYPE_CHECKING:
    from lumina_ds.measure.selftest.curves import Comparison

PRECISIONS = ("fp32", "mixed_bf16", "bf16", "fp16")


@click.command(epilog="Example: lumina selftest --config b7 --precision fp32 --precision mixed_bf16")
@click.option("--config", metavar="PRESET|FILE", help="Take this configuration's kind of model, shrunk.")
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks on this machine [two; as many as there are GPUs].")
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS),
    help="Repeat for several [fp32, and on a GPU what auto takes there].",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=2), default=10, show_default=True, help="Steps of every layout.")
@click.option(
    "--case-seconds", type=click.FloatRange(min=1), default=120, show_default=True,
    help="End a self-test in which no layout ends for so long.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    config: str | None, ranks: int | None, precisions: tuple[str, ...], steps: int, case_seconds: float, as_json: bool
) -> None:
    """Train a tiny model a few steps under every ZeRO stage, expert parallelism, number of ranks, accumulation,
    packing, checkpointing and loss, and compare gradients, losses and gradient norms, with plain PyTorch too.

    A pair that differs by more than rounding gives exit code 7; a hang gives 8. Nothing is kept.
    """
    from lumina_ds.config.load import load_config
    from lumina_ds.engine.resources import num_local_devices
    from lumina_ds.engine.world import check_deepspeed_version
    from lumina_ds.measure.selftest.run import SelfTest
    from lumina_ds.model.device import device_and_precision

    check_deepspeed_version()
    started = time.monotonic()
    device, automatic, _ = device_and_precision("auto")
    num_ranks = ranks or (num_local_devices() if device == "cuda" else 2)
    if device == "cuda" and num_ranks > num_local_devices():
        raise ConfigError(f"--ranks {num_ranks} needs as many GPUs, and there are {num_local_devices()}; use fewer")
    chosen = tuple(dict.fromkeys(precisions or ("fp32", automatic)))
    for name in chosen:
        device_and_precision(name)
    test = SelfTest(num_ranks, chosen, steps, load_config(config).config if config else None)
    with tempfile.TemporaryDirectory(prefix="lumina-selftest-") as folder:
        found = test.run(Path(folder), case_seconds, lambda line: click.echo(f"  {line}", err=True))
    failed = [comparison for comparison in found if comparison.fault]
    seconds = time.monotonic() - started
    if as_json:
        head = {"passed": not failed, "device": device, "ranks": num_ranks, "steps": steps, "precisions": chosen}
        pairs = [asdict(comparison) for comparison in found]
        click.echo(json.dumps({**head, "seconds": seconds, "set_aside": test.set_aside, "pairs": pairs}))
    else:
        _print(found, test.set_aside)
        without = "" if num_ranks > 1 else "; on one rank nothing is said of several, nor of expert parallelism"
        click.echo(
            f"{counted(len(found), 'pair')}, {counted(steps, 'step')} each, {device}, up to {counted(num_ranks, 'rank')}, {seconds:.0f} s{without}"
        )
    if failed:
        first = failed[0]
        more = f"; {len(failed) - 1} more pairs differ" if len(failed) > 1 else ""
        raise UnstableError(f"the self-test failed: {first.name}: {first.fault}{more}")


def _print(found: list[Comparison], set_aside: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "pair", "against", "loss", "norm", "gradients", "tolerance"):
        table.add_column(column, justify="right" if column in ("loss", "norm", "gradients", "tolerance") else "left")
    topic = ""
    for each in found:
        heading = f"{each.topic}, {each.precision}"
        if heading != topic:
            table.add_row("", heading, style="bold")
            topic = heading
        numbers: list[Any] = [f"{value:.1e}" for value in (each.loss, each.grad_norm, each.gradients)]
        table.add_row(
            "✖" if each.fault else "✔",
            each.left,
            each.right,
            *numbers,
            f"{each.tolerance:g} / {each.gradient_tolerance:g}",
        )
    console = Console(file=sys.stdout, highlight=False, markup=False, width=160)
    console.print(table)
    for each in found:
        if each.fault:
            console.print(f"✖ {each.name}: {each.fault}")
    for note in set_aside:
        console.print(f"set aside: {note}")
