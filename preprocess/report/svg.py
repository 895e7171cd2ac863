"""Histograms as inline SVG, drawn from bins: colours come from the page's style, so they follow light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from preprocess.report.distribution import PERCENTILES, Bin, Distribution
from preprocess.report.page import details, escape, table

_WIDTH, _HEIGHT = 736, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 24, 46
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
    step = _grid_step(highest)
    top = -(-highest // step) * step
    width = (_WIDTH - _LEFT - _RIGHT) / len(bins)
    floor = _HEIGHT - _BOTTOM
    scale = (floor - _TOP) / top
    parts = [*_grid(step, top, scale, floor), *_bars(bins, width, scale, floor), *_labels(bins, width, floor)]
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(unit)}</text>'
    )
    if mark:
        parts += _mark(bins, width, floor, *mark)
    description = f"Histogram of {len(bins)} bins from {bins[0].first:,} to {bins[-1].last:,}; highest {highest:,}."
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}. {escape(description)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>" + "".join(parts) + "</svg>"
    )


def _grid(step: int, top: int, scale: float, floor: float) -> Iterator[str]:
    for value in range(0, top + 1, step):
        y = floor - value * scale
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,}</text>'


def _bars(bins: Sequence[Bin], width: float, scale: float, floor: float) -> Iterator[str]:
    gap = min(2.0, width * 0.15)
    for number, b in enumerate(bins):
        if not b.count:
            continue
        height = max(1.0, b.count * scale)
        yield (
            f'<rect class="{"tail" if b.is_tail else "bar"}" x="{_LEFT + number * width + gap / 2:.1f}" '
            f'y="{floor - height:.1f}" width="{width - gap:.1f}" height="{height:.1f}">'
            f"<title>{b.label}: {b.count:,}</title></rect>"
        )


def _labels(bins: Sequence[Bin], width: float, floor: float) -> Iterator[str]:
    """The lower border of every few bins; a bin of one value is named at its middle."""
    is_single = bins[0].first == bins[0].last
    every = -(-len(bins) // _NUM_LABELS)
    tail = next((number for number, b in enumerate(bins) if b.is_tail), None)
    for number, b in enumerate(bins):
        if b.is_tail or (number % every == 0 and (tail is None or tail - number >= every)):
            x = _LEFT + (number + (0.5 if is_single or b.is_tail else 0)) * width
            sign = "≥ " if b.is_tail else ""
            yield f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{sign}{b.first:,}</text>'


def _mark(bins: Sequence[Bin], width: float, floor: float, value: int, name: str) -> Iterator[str]:
    closed = [b for b in bins if not b.is_tail]
    low, high = closed[0].first, closed[-1].last + 1
    if not low <= value <= high:
        return
    x = _LEFT + (value - low) / (high - low) * len(closed) * width
    on_left = x > _WIDTH * 0.7
    anchor, place = ("end", x - 6) if on_left else ("start", x + 6)
    yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{floor}"/>'
    yield f'<text class="mark-label" x="{place:.1f}" y="{_TOP + 4}" text-anchor="{anchor}">{escape(name)}</text>'


def _grid_step(highest: int) -> int:
    """A round step that gives about _NUM_GRID_LINES lines."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power * _NUM_GRID_LINES >= highest:
                return digit * power
        power *= 10
