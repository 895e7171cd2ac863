"""Line plots as inline SVG: means with a band from minimum to maximum, marks, round axes; no scripts.

What is pointed at names itself by SVG titles: a hundred strips over the plot, and every mark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from lumina_ds.report.page import escape
from lumina_ds.report.plot import NARROW, Frame, at_both_widths, axis_title, grid_lines, round_step, svg
from lumina_ds.report.scale import Point, Scale, label, spans_decades

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
.heights label { color: var(--muted); font-size: .85rem; } .heights input { accent-color: var(--accent); }
.heights .log, .heights:has(:checked) .linear { display: none; } .heights:has(:checked) .log { display: block; }
.plots h3, .plots figure { margin-top: .5rem; }
"""
_WIDE = Frame(height=240)
_NUM_LABELS = 6
_NUM_STRIPS = 100
_DIGIT_WIDTH = 7.5


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

    @property
    def points(self) -> list[Point]:
        """Those of all lines."""
        return [point for line in self.lines for point in line.points]


def line_figure(plot: LinePlot) -> str:
    """The plot with its heading, and a legend where there is more than one thing to tell apart."""
    heading = f"<h3>{escape(plot.title)}{f' <small class=muted>{escape(plot.unit)}</small>' if plot.unit else ''}</h3>"
    if not plot.points:
        return f'<figure>{heading}<p class="muted">Nothing was recorded.</p></figure>'
    colours = ("var(--accent)", "var(--second)")
    keys = [(line.name, colours[line.colour]) for line in plot.lines if line.points]
    if plot.ticks:
        keys.append(("checkpoint", "var(--good)"))
    if plot.bad:
        keys.append(("not finite", "var(--error)"))
    items = "".join(f'<span style="--key: {colour}">{escape(name)}</span>' for name, colour in keys)
    legend = f'<div class="legend">{items}</div>' if len(keys) > 1 else ""
    return f"<figure>{heading}{legend}{_both_heights(plot)}</figure>"


def _both_heights(plot: LinePlot) -> str:
    """The plot; where its height may be logarithmic, a switch between both ways to draw it, without a script."""
    starts_log = spans_decades(plot.points) if plot.may_be_log else None
    if starts_log is None:
        return _both_widths(plot, is_log=False)
    box = f'<label><input type="checkbox"{" checked" if starts_log else ""}/> logarithmic height</label>'
    drawn = "".join(
        f'<div class="{kind}">{_both_widths(plot, is_log)}</div>' for kind, is_log in (("linear", False), ("log", True))
    )
    return f'<div class="heights">{box}{drawn}</div>'


def _both_widths(plot: LinePlot, is_log: bool) -> str:
    if not plot.is_wide:
        return line_svg(plot, NARROW, is_log)
    return at_both_widths(lambda frame: line_svg(plot, frame, is_log), _WIDE)


def line_svg(plot: LinePlot, frame: Frame = _WIDE, is_log: bool = False) -> str:
    """The SVG element alone; at least one line must have a point, and with `is_log` all must be positive."""
    scale = Scale.of(plot.points, frame, plot.from_zero, is_log)
    parts = [*grid_lines(frame, [(scale.y(value), label(value)) for value in scale.values]), *_steps(scale)]
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
    last = "; ".join(f"{line.name} ends at {label(line.points[-1].mean)}" for line in plot.lines if line.points)
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


def _draw(line: Line, scale: Scale) -> Iterator[str]:
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


def _strips(line: Line, scale: Scale) -> Iterator[str]:
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


def _steps(scale: Scale) -> Iterator[str]:
    """Round steps below the plot."""
    every = max(1, int(round_step(max(1, scale.last - scale.first) / (_NUM_LABELS * scale.frame.width / _WIDE.width))))
    for step in range(-(-scale.first // every) * every, scale.last + 1, every):
        text, x = f"{step:,}", scale.x(step)
        # A long number at the right border would be cut in the middle.
        reaches_out = x + len(text) * _DIGIT_WIDTH / 2 > scale.frame.width
        place, anchor = (scale.frame.width - 1, "end") if reaches_out else (x, "middle")
        yield f'<text x="{place:.1f}" y="{scale.frame.floor + 17}" text-anchor="{anchor}">{text}</text>'
