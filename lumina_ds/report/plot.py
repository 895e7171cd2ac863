"""What every SVG plot shares: its frame, round steps for axes, and horizontal grid lines with their labels.

Colours come from the page's style, so plots follow light and dark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lumina_ds.report.page import escape


@dataclass(frozen=True)
class Frame:
    """The drawing area in SVG units, and the margins that labels stand in."""

    width: int = 736
    height: int = 260
    left: int = 64
    right: int = 16
    top: int = 24
    bottom: int = 46

    @property
    def floor(self) -> int:
        return self.height - self.bottom

    @property
    def inner_width(self) -> int:
        return self.width - self.left - self.right

    @property
    def inner_height(self) -> int:
        return self.floor - self.top


# Beside another plot, or on a small screen: the same size of text in half the width.
NARROW = Frame(width=440, height=200, left=56, right=10, top=16, bottom=42)


def at_both_widths(draw: Callable[[Frame], str], wide: Frame) -> str:
    """The plot in a wide frame, and in the narrow one for small screens, which would shrink the wide one's labels."""
    return f'<div class="wide">{draw(wide)}</div><div class="narrow">{draw(NARROW)}</div>'


def svg(frame: Frame, title: str, description: str, parts: Iterable[str]) -> str:
    """The element with its text alternative; `parts` are SVG."""
    return (
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(title)}. {escape(description)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def grid_lines(frame: Frame, lines: Iterable[tuple[float, str]]) -> Iterator[str]:
    """Horizontal lines, each at a height with its label left of it."""
    for y, label in lines:
        yield (
            f'<line class="grid" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )


def axis_title(frame: Frame, text: str) -> str:
    """What the horizontal axis counts, centred below it."""
    middle = frame.left + frame.inner_width / 2
    return f'<text x="{middle:.1f}" y="{frame.height - 8}" text-anchor="middle">{escape(text)}</text>'


def round_step(smallest: float) -> float:
    """The first of 1, 2, 5, 10, 20, 50, ... (and of 0.5, 0.2, 0.1, ...) that is not below `smallest` > 0."""
    # Powers are read from their spelling: 10.0**-3 is not the nearest float to 0.001 everywhere.
    exponent = int(f"{smallest:e}".partition("e")[2])
    for power in (exponent, exponent + 1):
        for digit in (1, 2, 5):
            step = float(f"{digit}e{power}")
            if step >= smallest:
                return step
    return float(f"1e{exponent + 2}")
