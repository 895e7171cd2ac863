"""A sheet of SVG that a picture is drawn on: rectangles, text, arrows. All lengths are SVG units.

Sheets are 520 units wide with text of 13, so that they stay readable on a telephone, at 420 pixels.
"""

from __future__ import annotations

import html

WIDTH = 520
TEXT = "#1c2128"
MUTED = "#59636e"
LINE = "#c4ccd4"
# Light fills, each with a darker edge; they differ in lightness too, for those who do not see the hues.
CONTEXT = ("#dbe6f4", "#7f9cc0")
LABEL = ("#a9dcb0", "#3d8b4b")
SPECIAL = ("#cfc6e8", "#7a68b3")
PADDING = ("#f2f3f5", "#c4ccd4")
NEW = ("#fff1c2", "#c9a227")
GROUPS = (("#cfe3f7", "#4f83b8"), ("#f9d9bf", "#c07a3a"), ("#c9e8cf", "#4d9459"), ("#e5d1f0", "#8d5aac"))

SANS = "DejaVu Sans, Verdana, Arial, sans-serif"
MONO = "DejaVu Sans Mono, Menlo, Consolas, monospace"
# Width of a letter of MONO over its size.
MONO_RATIO = 0.602


class Canvas:
    """Collects elements from top to bottom; `svg` gives the whole picture."""

    def __init__(self, title: str, description: str) -> None:
        self.title = title
        self.description = description
        self.height = 0.0
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, colours: tuple[str, str], radius: float = 3
    ) -> None:
        """A box of the two colours: fill and edge."""
        self._grow(y + height)
        fill, edge = colours
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
            f'stroke="{edge}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 13,
        colour: str = TEXT,
        anchor: str = "start",
        mono: bool = False,
        bold: bool = False,
    ) -> None:
        """One line whose baseline is y. Text of MONO is stretched to its nominal width, whatever font is there."""
        self._grow(y + size * 0.3)
        exact = f' textLength="{len(text) * size * MONO_RATIO:.1f}" lengthAdjust="spacingAndGlyphs"' if mono else ""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{MONO if mono else SANS}" font-size="{size:g}" fill="{colour}" '
            f'text-anchor="{anchor}" xml:space="preserve"{weight}{exact}>{html.escape(text)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = MUTED, width: float = 1.5) -> None:
        self._parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"/>'
        )

    def arrow_down(self, x: float, y1: float, y2: float) -> None:
        """An arrow from (x, y1) down to (x, y2)."""
        self.line(x, y1, x, y2 - 5)
        self._parts.append(f'<path d="M{x - 5:g} {y2 - 7:g}h10l-5 7z" fill="{MUTED}"/>')

    def _grow(self, bottom: float) -> None:
        self.height = max(self.height, bottom)

    def svg(self) -> str:
        """The picture, on a white sheet, since the site may be dark."""
        height = round(self.height + 14)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">',
                f"<title>{html.escape(self.title)}</title>",
                f"<desc>{html.escape(self.description)}</desc>",
                f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
                *self._parts,
                "</svg>",
                "",
            ]
        )


def mono_width(text: str, size: float = 13) -> float:
    """Width of a line of MONO."""
    return len(text) * size * MONO_RATIO
