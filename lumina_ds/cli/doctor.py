"""`lumina doctor`: whether training can run here, and what to mend."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lumina_ds.errors import MachineError
from lumina_ds.text import counted

if TYPE_CHECKING:
    from lumina_ds.doctor.finding import Finding

COLOURS = {"ok": "green", "warning": "yellow", "fault": "red"}


@click.command(epilog="Example: lumina doctor --verbose --hostfile hostfile")
@click.option("--verbose", is_flag=True, help="Show what each check saw, and ask the builder of every DeepSpeed op.")
@click.option("--hostfile", type=click.Path(path_type=Path), help="Check ssh, pdsh and versions of these hosts too.")
@click.option("--runs-dir", type=click.Path(path_type=Path), default=Path("runs"), help="Whose disk to look at.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(verbose: bool, hostfile: Path | None, runs_dir: Path, as_json: bool) -> None:
    """Check libraries, GPUs, memory, disks and leftovers of killed runs; say ok, warning or fault, and the remedy.

    A fault keeps training from running and gives exit code 4. Nothing is changed, and no GPU memory is used.
    """
    from lumina_ds.doctor.checks import examine
    from lumina_ds.doctor.finding import Surroundings

    around = Surroundings(runs_dir=runs_dir, verbose=verbose)
    slots = _hosts(hostfile) if hostfile else {}
    findings = examine(around)
    if slots:
        from lumina_ds.doctor.hosts import host_findings

        findings += host_findings(slots, around)
    faults = [finding.check for finding in findings if finding.level == "fault"]
    if as_json:
        document = {"can_train": not faults, "findings": [dataclasses.asdict(finding) for finding in findings]}
        click.echo(json.dumps(document))
    else:
        _print(findings, verbose)
    if faults:
        raise MachineError(f"training cannot run here: {', '.join(faults)}; mend what is marked fault")


def _hosts(hostfile: Path) -> dict[str, int]:
    try:
        from lumina_ds.engine.resources import planned_resources
    except ImportError as error:
        raise MachineError(f"--hostfile needs PyTorch ({error}); lumina doctor without it says what to mend") from error
    return {host: len(slots) for host, slots in planned_resources(["--hostfile", str(hostfile)]).items()}


def _print(findings: list[Finding], verbose: bool) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        light = click.style(f"{finding.level:<8}", fg=COLOURS[finding.level], bold=True)
        click.echo(f"{light} {finding.check:<{width}}  {finding.says}")
        if finding.remedy and (verbose or finding.level != "ok"):
            click.echo(f"{'':<{width + 11}}-> {finding.remedy}")
        for detail in finding.details if verbose else ():
            click.echo(click.style(f"{'':<{width + 11}}{detail}", dim=True))
    count = Counter(finding.level for finding in findings)
    click.echo(f"{count['ok']} ok, {counted(count['warning'], 'warning')}, {counted(count['fault'], 'fault')}")
