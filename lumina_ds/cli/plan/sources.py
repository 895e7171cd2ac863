"""The sources of a mixture in `train --dry-run`: a table for people, and records for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lumina_ds.text import format_count

if TYPE_CHECKING:
    from rich.console import Console

    from lumina_ds.config.schema import RunConfig
    from lumina_ds.data.mixture.forecast import SourceForecast

UNKNOWN = "known once they are preprocessed, at the start of the run"


def render_sources(config: RunConfig, sources: Sequence[SourceForecast] | None, console: Console) -> None:
    """Print what each source holds, its share, and what the run takes of it; nothing without a mixture."""
    from rich.table import Table

    if not config.data.sources:
        return
    if sources is None:
        names = ", ".join(source.name for source in config.data.sources)
        console.print(f"Sources {names}: tokens, rows and epochs are {UNKNOWN}.", highlight=False)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("source", no_wrap=True)
    for heading in ("tokens", "rows", "share", "tokens in the run", "epochs in the run"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in sources:
        capped = " (its cap)" if each.reaches_cap else ""
        numbers = (f"{each.tokens:,}", f"{each.rows:,}", f"{each.share:.2%}", format_count(round(each.tokens_in_run)))
        table.add_row(each.name, *numbers, f"{each.epochs:.3g}{capped}")
    console.print(table)
    if any(each.reaches_cap for each in sources):
        console.print("A source that reaches its cap leaves its place to the others.", highlight=False)


def sources_record(config: RunConfig, sources: Sequence[SourceForecast] | None) -> dict[str, Any]:
    """{"sources": ...}: a record of each, or None where they are not known yet; nothing without a mixture."""
    if not config.data.sources:
        return {}
    return {"sources": None if sources is None else [each.record() for each in sources]}
