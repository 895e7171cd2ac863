"""Histograms as inline SVG, drawn from bins: colours come from the page's style, so they follow light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lumina_ds.report.data.distribution import PERCENTILES, Bin, Distribution
from lumina_ds.report.page import details, escape, table
from lumina_ds.report.plot import Frame, axis_title, grid_lines, round_step, svg

_FRAME = Frame()
_PLOT_BINS = 40
_NUM_GRID_LINES = 4
_NUM_LABELS = 8


def figure(title: str, distribution: Distribution, unit: str, mark: tuple[int, str] | None = None) -> str:
    """A histogram with its percentiles as caption and its values as a table. `mark`: a value and its name."""
    bins = distribution.bins(_PLOT_BINS)
    if not bins:
        return f"<p>{escape(title)}: nothing to show.</p>"
    percentiles = ", ".join(f"p{p} {distribution.percentile(p):,}" for p in PERCENTILES)
    extremes = f"min {distribution.minimum:,}, {percentiles}, max {distribution.maximum:,}"
    caption = f"<figcaption>Mean {distribution.mean:,.1f}, {extremes}</figcaption>"
    rows = [(b.label, f"{b.count:,}", f"{b.count / distribution.count:.1%}") for b in bins]
    values = details("Values as a table", table((unit, "count", "share"), rows, title))
    plot = histogram(title, bins, unit, mark)
    return f"<figure><h3>{escape(title)}</h3>{plot}{caption}{values}</figure>"


def histogram(title: str, bins: Sequence[Bin], unit: str, mark: tuple[int, str] | None = None) -> str:
    """The SVG element alone; each bar names its values and count when pointed at."""
    highest = max(b.count for b in bins)
    step = max(1, int(round_step(highest / _NUM_GRID_LINES)))
    top = -(-highest // step) * step
    width = _FRAME.inner_width / len(bins)
    scale = _FRAME.inner_height / top
    lines = [(_FRAME.floor - value * scale, f"{value:,}") for value in range(0, top + 1, step)]
    parts = [*grid_lines(_FRAME, lines), *_bars(bins, width, scale), *_labels(bins, width), axis_title(_FRAME, unit)]
    if mark:
        parts += _mark(bins, width, *mark)
    description = f"Histogram of {len(bins)} bins from {bins[0].first:,} to {bins[-1].last:,}; highest {highest:,}."
    return svg(_FRAME, title, description, parts)


def _bars(bins: Sequence[Bin], width: float, scale: float) -> Iterator[str]:
    gap = min(2.0, width * 0.15)
    for number, b in enumerate(bins):
        if not b.count:
            continue
        height = max(1.0, b.count * scale)
        yield (
            f'<rect class="{"tail" if b.is_tail else "bar"}" x="{_FRAME.left + number * width + gap / 2:.1f}" '
            f'y="{_FRAME.floor - height:.1f}" width="{width - gap:.1f}" height="{height:.1f}">'
            f"<title>{b.label}: {b.count:,}</title></rect>"
        )


def _labels(bins: Sequence[Bin], width: float) -> Iterator[str]:
    """The lower border of every few bins; a bin of one value is named at its middle."""
    is_single = bins[0].first == bins[0].last
    every = -(-len(bins) // _NUM_LABELS)
    tail = next((number for number, b in enumerate(bins) if b.is_tail), None)
    for number, b in enumerate(bins):
        if b.is_tail or (number % every == 0 and (tail is None or tail - number >= every)):
            x = _FRAME.left + (number + (0.5 if is_single or b.is_tail else 0)) * width
            sign = "≥ " if b.is_tail else ""
            yield f'<text x="{x:.1f}" y="{_FRAME.floor + 17}" text-anchor="middle">{sign}{b.first:,}</text>'


def _mark(bins: Sequence[Bin], width: float, value: int, name: str) -> Iterator[str]:
    closed = [b for b in bins if not b.is_tail]
    low, high = closed[0].first, closed[-1].last + 1
    if not low <= value <= high:
        return
    x = _FRAME.left + (value - low) / (high - low) * len(closed) * width
    on_left = x > _FRAME.width * 0.7
    anchor, place = ("end", x - 6) if on_left else ("start", x + 6)
    yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_FRAME.top - 6}" y2="{_FRAME.floor}"/>'
    yield f'<text class="mark-label" x="{place:.1f}" y="{_FRAME.top + 4}" text-anchor="{anchor}">{escape(name)}</text>'
