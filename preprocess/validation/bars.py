"""Histograms in text: one line per bin, bars of block characters in eighths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lumina_ds.report.data.distribution import Bin

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int, ascii_only: bool = False) -> str:
    """A bar of `share` (0 to 1) of `width` cells; something above nothing is always seen."""
    if ascii_only:
        return "#" * max(round(share * width), int(share > 0))
    eighths = max(round(share * width * 8), int(share > 0))
    whole, part = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[part] if part else "")


def histogram_lines(bins: Sequence[Bin], width: int, ascii_only: bool = False) -> Iterator[str]:
    """Lines of at most `width` cells: the bin, its bar, its count and share."""
    total = sum(b.count for b in bins)
    highest = max((b.count for b in bins), default=0)
    labels = max((len(b.label) for b in bins), default=0)
    counts = len(f"{highest:,}")
    room = max(4, width - labels - counts - len("    100.0 %"))
    for b in bins:
        shown = bar(b.count / highest if highest else 0.0, room, ascii_only)
        yield f"{b.label:>{labels}}  {shown:<{room}} {b.count:>{counts},} {b.count / max(1, total):>7.1%}"
