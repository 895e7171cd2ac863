"""Heat maps as embedded PNG images: one pixel per cell, so that a hundred layers of experts stay small.

The even value is transparent, and the colours are too the nearer they are to it: light and dark pages both suit.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from lumina_ds.report.page import escape

_BELOW, _ABOVE = (37, 99, 201), (224, 96, 0)
_EVEN = 128

HEAT_STYLE = """
.heat { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: .8rem 1.2rem; }
.heat figure { margin: 0; } .heat img { display: block; width: 100%; image-rendering: pixelated;
  border: 1px solid var(--line); background: var(--panel); }
.heat .number { float: right; } .ramp { display: inline-block; width: 12rem; height: .8em; vertical-align: -.1em;
  border: 1px solid var(--line); background: linear-gradient(to right, rgb(37 99 201), transparent, rgb(224 96 0)); }
@media print { .heat img { print-color-adjust: exact; } }
"""


def heat_image(loads: np.ndarray, description: str, height: int) -> str:
    """An <img> of `loads` [rows, columns], 0 blue, 1 even and transparent, 2 and above orange.

    `height` in CSS pixels.
    """
    cells = np.rint(1 + np.clip(loads, 0.0, 2.0) * (_EVEN - 1)).astype(np.uint8)
    data = base64.b64encode(_png(cells)).decode("ascii")
    return f'<img style="height: {height}px" alt="{escape(description)}" src="data:image/png;base64,{data}">'


def _png(cells: np.ndarray) -> bytes:
    """A palette PNG with transparency (PNG specification, third edition, sections 5 and 11)."""
    rows, columns = cells.shape
    shades = [abs(value - _EVEN) / (_EVEN - 1) for value in range(256)]
    palette = bytes(part for value in range(256) for part in (_BELOW if value < _EVEN else _ABOVE))
    alpha = bytes(min(255, round(255 * shade)) for shade in shades)
    # Every row begins with its filter type, 0: none.
    raw = np.hstack([np.zeros((rows, 1), np.uint8), cells]).tobytes()
    chunks: Sequence[tuple[bytes, bytes]] = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", alpha),
        (b"IDAT", zlib.compress(raw, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
