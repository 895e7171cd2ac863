"""Draw every picture of the documentation from the code.

    python docs/pictures/draw.py                  write the SVG files beside this one
    python docs/pictures/draw.py --out FOLDER     write them there

tests/docs/test_pictures.py compares the committed files with what this draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import checkpoint
import grid
import packages
import packing
import screens

PICTURES: dict[str, Callable[[], str]] = {
    "packing": packing.draw,
    "grid": grid.draw,
    "checkpoint": checkpoint.draw,
    "packages": packages.draw,
    "live-line": screens.live_line,
    "report": screens.report,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (out / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
