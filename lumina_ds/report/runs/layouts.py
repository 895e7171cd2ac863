"""How many ranks an elastic run had, from which step on: a section of the run's report."""

from __future__ import annotations

from collections.abc import Sequence

from lumina_ds.monitor.layouts import LayoutRecord
from lumina_ds.report.page import escape, table

_HEADINGS = ("first step", "ranks", "ZeRO stage", "expert-parallel size", "accumulation")


def layout_section(layouts: Sequence[LayoutRecord], name: str) -> str:
    """A row for every life; empty for a run that is not elastic."""
    if not layouts:
        return ""
    rows = [
        (one.step + 1, one.ranks, one.zero_stage, one.expert_parallel_size, one.gradient_accumulation_steps)
        for one in layouts
    ]
    return f"<h3>{escape(name)}</h3>" + table(_HEADINGS, rows, num_text_columns=0)
