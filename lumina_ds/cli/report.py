"""`lumina report`: a run, two runs, or a folder of runs as one self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lumina_ds.errors import DataError


@click.command(epilog="Example: lumina report runs/debug --compare runs/debug-2")
@click.argument("path", metavar="RUN|DIR", type=click.Path(path_type=Path))
@click.option("--compare", "other", metavar="RUN2", type=click.Path(path_type=Path), help="Draw a second run over it.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The page; else RUN/report.html.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON document.")
def command(path: Path, other: Path | None, out: Path | None, as_json: bool) -> None:
    """Write plots, expert usage, checkpoints and configuration of RUN as one HTML page.

    DIR, a folder of runs, gives a table of them with small plots. A run may still be training.
    """
    from lumina_ds.report.page import write_page
    from lumina_ds.report.runs.config import differences
    from lumina_ds.report.runs.overview import overview_page
    from lumina_ds.report.runs.page import run_page
    from lumina_ds.report.runs.run import is_run, read_run, runs_below

    page_path = out or path / ("report.html" if other is None else f"report-{path.name}-{other.name}.html")
    if path.is_dir() and not is_run(path) and (found := runs_below(path)):
        if other is not None:
            raise click.UsageError(
                f"--compare takes two runs, and {path} is a folder of {len(found)}; name one of them"
            )
        runs = [read_run(each) for each in found]
        document = overview_page(path, runs, page_path)
    else:
        if not path.is_dir():
            raise DataError(f"{path} is no folder; give runs/NAME or runs")
        runs = [read_run(each) for each in (path, other) if each is not None]
        document = run_page(*runs)
    write_page(document, page_path)
    if as_json:
        compared = differences(runs[0].config, runs[1].config) if other is not None else []
        summary = {"report": str(page_path), "runs": [run.summary() for run in runs], "differences": compared}
        click.echo(json.dumps(summary))
        return
    for fault in (fault for run in runs for fault in run.faults):
        click.echo(f"warning: {fault}", err=True)
    click.echo(f"{page_path}: {', '.join(run.name for run in runs)} in a browser")
