"""Line plots as inline SVG: means with a band from minimum to maximum, marks, round axes; no scripts.

What is pointed at names itself by SVG titles: a hundred strips over the plot, and every mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from lumina_ds.report.page import escape
from lumina_ds.report.plot import Frame, axis_title, grid_lines, round_step, svg

LINE_STYLE = """
:root { --second: #b35900; } @media (prefers-color-scheme: dark) { :root { --second: #ffb066; } }
svg .line0, svg .line1 { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round; }
svg .line1 { stroke: var(--second); } svg .band0, svg .band1 { fill: var(--accent); opacity: .18; }
svg .band1 { fill: var(--second); } svg .strip { fill: transparent; } svg .strip:hover { fill: var(--line); opacity: .5; }
svg .dot0 { fill: var(--accent); } svg .dot1 { fill: var(--second); }
svg .dot0, svg .dot1 { stroke: var(--page); stroke-width: 1.5; }
svg .tick { stroke: var(--good); stroke-width: 2; } svg .bad { stroke: var(--error); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; color: var(--muted); font-size: .85rem; }
.legend span::before { content: ""; display: inline-block; width: 1.1em; height: .22em; margin-right: .4em;
  vertical-align: middle; background: var(--key); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); gap: 0 1.5rem; }
.plots h3, .plots figure { margin-top: .5rem; }
"""
_WIDE = Frame(height=240)
# Beside another plot: the same size of text in half the width.
_NARROW = Frame(width=440, height=200, left=56, right=10, top=16, bottom=42)
_NUM_GRID_LINES = 4
_NUM_LABELS = 6
_NUM_STRIPS = 100
_DIGIT_WIDTH = 7.5
# Gradient norms span decades when a run is unstable; below this ratio a linear axis shows more.
_LOG_RATIO = 30


@dataclass(frozen=True)
class Point:
    """The values of the steps `first` to `last`."""

    first: int
    last: int
    mean: float
    low: float
    high: float

    @property
    def x(self) -> float:
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class Line:
    """Points in order of steps. `colour` 0 or 1; `dots` draws each point, with what it says when pointed at."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dots: bool = False


@dataclass(frozen=True)
class LinePlot:
    """What to draw. `ticks` and `bad` are steps marked at the floor and at the top, with what they mean."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    from_zero: bool = False
    may_be_log: bool = False
    is_wide: bool = True
    ticks: Sequence[tuple[int, str]] = field(default_factory=tuple)
    bad: Sequence[tuple[int, str]] = field(default_factory=tuple)


def line_figure(plot: LinePlot) -> str:
    """The plot with its heading, and a legend where there is more than one thing to tell apart."""
    heading = f"<h3>{escape(plot.title)}{f' <small class=muted>{escape(plot.unit)}</small>' if plot.unit else ''}</h3>"
    if not any(line.points for line in plot.lines):
        return f'<figure>{heading}<p class="muted">Nothing was recorded.</p></figure>'
    colours = ("var(--accent)", "var(--second)")
    keys = [(line.name, colours[line.colour]) for line in plot.lines if line.points]
    if plot.ticks:
        keys.append(("checkpoint", "var(--good)"))
    if plot.bad:
        keys.append(("not finite", "var(--error)"))
    items = "".join(f'<span style="--key: {colour}">{escape(name)}</span>' for name, colour in keys)
    legend = f'<div class="legend">{items}</div>' if len(keys) > 1 else ""
    return f"<figure>{heading}{legend}{line_svg(plot)}</figure>"


def line_svg(plot: LinePlot) -> str:
    """The SVG element alone; at least one line must have a point."""
    scale = _Scale.of(plot)
    frame = scale.frame
    parts = [*grid_lines(frame, [(scale.y(value), _label(value)) for value in scale.values]), *_steps(scale)]
    for line in plot.lines:
        parts += _draw(line, scale)
    for steps, style, (above, below) in (
        (plot.ticks, "tick", (frame.floor - 9, frame.floor)),
        (plot.bad, "bad", (frame.top - 9, frame.top)),
    ):
        for step, meaning in steps:
            x = scale.x(step)
            parts.append(
                f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{above}" y2="{below}">'
                f"<title>{escape(meaning)}</title></line>"
            )
    parts.append(axis_title(frame, "step" + (" (logarithmic height)" if scale.is_log else "")))
    last = "; ".join(f"{line.name} ends at {_label(line.points[-1].mean)}" for line in plot.lines if line.points)
    return svg(frame, plot.title, f"Steps {scale.first:,} to {scale.last:,}; {last}.", parts)


def sparkline(points: Sequence[Point], title: str, width: int = 160, height: int = 36) -> str:
    """A small line without axes, for a cell of a table."""
    if not points:
        return ""
    low, high = min(p.mean for p in points), max(p.mean for p in points)
    first, span = points[0].x, (points[-1].x - points[0].x) or 1
    path = " ".join(
        f"{2 + (p.x - first) / span * (width - 4):.1f},{height - 3 - (p.mean - low) / ((high - low) or 1) * (height - 6):.1f}"
        for p in points
    )
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f'<title>{escape(title)}</title><polyline class="line0" points="{path}"/></svg>'
    )


@dataclass(frozen=True)
class _Scale:
    """From steps and values to places in the frame."""

    frame: Frame
    first: int
    last: int
    low: float
    high: float
    values: list[float]
    is_log: bool

    @classmethod
    def of(cls, plot: LinePlot) -> _Scale:
        points = [point for line in plot.lines for point in line.points]
        frame = _WIDE if plot.is_wide else _NARROW
        low, high = min(p.low for p in points), max(p.high for p in points)
        first, last = min(p.first for p in points), max(p.last for p in points)
        if plot.may_be_log and low > 0 and high / low > _LOG_RATIO:
            values = _log_values(low, high)
            return cls(frame, first, last, min(low, values[0]), max(high, values[-1]), values, True)
        if plot.from_zero:
            low = min(low, 0.0)
        if high == low:
            high = low + (abs(low) or 1.0)
        step = round_step((high - low) / _NUM_GRID_LINES)
        begin, end = math.floor(low / step), math.ceil(high / step)
        # Round to what the step can say: 3 * 0.1 is not 0.3.
        values = [float(f"{number * step:.12g}") for number in range(begin, end + 1)]
        return cls(frame, first, last, values[0], values[-1], values, False)

    def x(self, step: float) -> float:
        span = (self.last - self.first) or 1
        return self.frame.left + (step - self.first) / span * self.frame.inner_width

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.frame.floor - (value - low) / (high - low) * self.frame.inner_height


def _log_values(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 3) if len(decades) < 4 else (1,)
    every = max(1, len(decades) // 6)
    values = [float(f"{digit}e{decade}") for decade in decades[::every] for digit in digits]
    return [value for value in values if low * 0.3 <= value <= high * 3]


def _draw(line: Line, scale: _Scale) -> Iterator[str]:
    points = line.points
    if not points:
        return
    if any(p.high > p.low for p in points):
        edge = [f"{scale.x(p.x):.1f},{scale.y(p.high):.1f}" for p in points]
        edge += [f"{scale.x(p.x):.1f},{scale.y(p.low):.1f}" for p in reversed(points)]
        yield f'<polygon class="band{line.colour}" points="{" ".join(edge)}"/>'
    path = " ".join(f"{scale.x(p.x):.1f},{scale.y(p.mean):.1f}" for p in points)
    yield f'<polyline class="line{line.colour}" points="{path}"/>'
    if line.dots or len(points) == 1:
        for p in points:
            yield (
                f'<circle class="dot{line.colour}" cx="{scale.x(p.x):.1f}" cy="{scale.y(p.mean):.1f}" r="4">'
                f"<title>{escape(_says(line.name, p))}</title></circle>"
            )
    elif line.colour == 0:
        yield from _strips(line, scale)


def _strips(line: Line, scale: _Scale) -> Iterator[str]:
    """Invisible strips over the plot that name the values below the pointer."""
    every = -(-len(line.points) // _NUM_STRIPS)
    chosen = line.points[every // 2 :: every]
    borders = [(a.x + b.x) / 2 for a, b in pairwise(chosen)]
    for point, left, right in zip(chosen, [scale.first, *borders], [*borders, scale.last], strict=True):
        begin, end = scale.x(left), scale.x(right)
        yield (
            f'<rect class="strip" x="{begin:.1f}" y="{scale.frame.top}" width="{max(0.0, end - begin):.1f}" '
            f'height="{scale.frame.inner_height}"><title>{escape(_says(line.name, point))}</title></rect>'
        )


def _says(name: str, point: Point) -> str:
    steps = f"step {point.first:,}" if point.first == point.last else f"steps {point.first:,} to {point.last:,}"
    spread = f" ({point.low:.5g} to {point.high:.5g})" if point.high > point.low else ""
    return f"{name}, {steps}: {point.mean:.5g}{spread}"


def _steps(scale: _Scale) -> Iterator[str]:
    """Round steps below the plot."""
    every = max(1, int(round_step(max(1, scale.last - scale.first) / (_NUM_LABELS * scale.frame.width / _WIDE.width))))
    for step in range(-(-scale.first // every) * every, scale.last + 1, every):
        label, x = f"{step:,}", scale.x(step)
        # A long number at the right border would be cut in the middle.
        reaches_out = x + len(label) * _DIGIT_WIDTH / 2 > scale.frame.width
        place, anchor = (scale.frame.width - 1, "end") if reaches_out else (x, "middle")
        yield f'<text x="{place:.1f}" y="{scale.frame.floor + 17}" text-anchor="{anchor}">{label}</text>'


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
