"""The page of `lumina report DIR`: all runs of a folder, each in a line with small plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from lumina_ds.report.line_plot import LINE_STYLE, sparkline
from lumina_ds.report.page import escape, page, scrolling, section
from lumina_ds.report.runs.run import RunRecord, moment
from lumina_ds.text import counted

_STYLE = "svg.spark { width: 10rem; } td.spark { padding: .15rem .7rem .15rem 0; }"
# Heading -> class of its cells.
_COLUMNS = {
    "run": "text",
    "preset": "text",
    "steps": "number",
    "loss": "number",
    "loss over the steps": "spark",
    "best evaluation": "number",
    "tokens per second": "number",
    "speed over the steps": "spark",
    "skipped": "number",
    "last record": "text",
}


def overview_page(folder: Path, runs: Sequence[RunRecord], page_path: Path) -> str:
    """The whole document. Runs with a page of their own are linked, relative to `page_path`."""
    newest_first = sorted(runs, key=lambda run: run.last_time or 0.0, reverse=True)
    return page(
        f"Runs in {folder.resolve().name}",
        f"{counted(len(runs), 'run')}, the newest first",
        [section("Runs", _table(newest_first, page_path))],
        LINE_STYLE + _STYLE + "body { max-width: 84rem; }",
    )


def _table(runs: Sequence[RunRecord], page_path: Path) -> str:
    head = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in _COLUMNS.items())
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{cell}</td>'
            for kind, cell in zip(_COLUMNS.values(), _cells(run, page_path), strict=True)
        )
        + "</tr>"
        for run in runs
    )
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def _cells(run: RunRecord, page_path: Path) -> Iterator[str]:
    loss, speed, best = run.series["loss"], run.series["tokens_per_second"], run.best_evaluation
    planned = f" of {run.planned_steps:,}" if run.planned_steps else ""
    yield _link(run, page_path)
    yield escape(run.config.get("preset") or "none")
    yield f"{run.last_step:,}{planned}"
    yield "none" if loss.last is None else f"{loss.last:.4f}"
    yield sparkline(loss.points, f"loss of {run.name}")
    yield f"{best.mean:.4f}" if best else "none"
    yield "none" if speed.mean is None else f"{speed.mean:,.0f}"
    yield sparkline(speed.points, f"tokens per second of {run.name}")
    yield f"{run.skipped:,}"
    yield escape(moment(run.last_time)) + (' <span class="warning">damaged</span>' if run.faults else "")


def _link(run: RunRecord, page_path: Path) -> str:
    target = run.path.resolve() / "report.html"
    if not target.is_file():
        return escape(run.name)
    try:
        relative = target.relative_to(page_path.resolve().parent).as_posix()
    except ValueError:
        relative = target.as_uri()
        return f'<a href="{escape(relative)}">{escape(run.name)}</a>'
    return f'<a href="{escape(quote(relative))}">{escape(run.name)}</a>'
