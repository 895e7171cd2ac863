"""The packages and their order, from the layers that tests/test_architecture.py holds."""

from __future__ import annotations

import ast
from pathlib import Path

from canvas import GROUPS, MUTED, WIDTH, Canvas

ARCHITECTURE_TEST = Path(__file__).parents[2] / "tests" / "test_architecture.py"
MARGIN = 16
HEIGHT = 34


def draw() -> str:
    """The whole picture: the highest layer on top, as wide as its packages are many."""
    canvas = Canvas(
        "The packages and their order", "Each package may import those below it, and none above it or beside it."
    )
    canvas.text(MARGIN, 26, "a package imports only what stands below it", bold=True)
    y = 42.0
    for number, packages in enumerate(reversed(layers())):
        names = sorted(name.removeprefix("lumina_ds.") for name in packages)
        width = (WIDTH - 2 * MARGIN - 8 * (len(names) - 1)) / len(names)
        for place, name in enumerate(names):
            x = MARGIN + place * (width + 8)
            canvas.rect(x, y, width, HEIGHT, GROUPS[number % len(GROUPS)], 5)
            canvas.text(x + width / 2, y + 22, name, anchor="middle")
        y += HEIGHT + 8
    canvas.text(MARGIN, y + 14, "all but preprocess and launch are parts of lumina_ds", size=12.5, colour=MUTED)
    return canvas.svg()


def layers() -> tuple[set[str], ...]:
    """LAYERS of the test, lowest first, read from its source."""
    for node in ast.parse(ARCHITECTURE_TEST.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LAYERS" and node.value is not None:
            return ast.literal_eval(node.value)
    raise LookupError(f"{ARCHITECTURE_TEST} has no LAYERS")
