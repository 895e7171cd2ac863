"""The committed pictures equal what docs/pictures draws from the code, and stay light and readable."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from documents import DOCS, ROOT, all_pages

PICTURES = DOCS / "pictures"
SVG = "{http://www.w3.org/2000/svg}"
# On a telephone a picture is so wide; smaller text than this many pixels cannot be read.
NARROW, SMALLEST_TEXT = 420, 9.5


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    command = [sys.executable, str(PICTURES / "draw.py"), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_committed_pictures_are_what_the_code_draws(drawn: Path) -> None:
    names = sorted(path.name for path in drawn.glob("*.svg"))
    assert names == sorted(path.name for path in PICTURES.glob("*.svg"))
    old = [name for name in names if (drawn / name).read_text() != (PICTURES / name).read_text()]
    assert old == [], "run python docs/pictures/draw.py and look at them"


@pytest.mark.parametrize("picture", sorted(PICTURES.glob("*.svg")), ids=lambda path: path.stem)
def test_pictures_are_light_self_contained_and_readable(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    assert len(text) < 60_000
    root = ET.fromstring(text)
    assert root.find(f"{SVG}title") is not None or "rich-terminal" in text
    assert not re.search(r"(?:href|src)=|url\(['\"]?https?:|<script", text), "it loads or runs something"
    width = float(root.attrib["viewBox"].split()[2])
    sizes = [float(size) for size in re.findall(r"font-size[=:]\s*[\"']?([\d.]+)", text)]
    assert sizes and min(sizes) * NARROW / width >= SMALLEST_TEXT


@pytest.mark.parametrize("picture", ["packing", "grid", "checkpoint", "packages"])
def test_text_stays_on_the_sheet_and_lines_do_not_overlap(picture: str) -> None:
    """By a width above that of the fonts named; a browser's view was looked at by hand."""
    root = ET.fromstring((PICTURES / f"{picture}.svg").read_text(encoding="utf-8"))
    width, boxes = float(root.attrib["viewBox"].split()[2]), []
    for element in root.iter(f"{SVG}text"):
        size = float(element.attrib["font-size"])
        length = float(element.attrib.get("textLength", len(element.text or "") * size * 0.62))
        shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[element.attrib["text-anchor"]]
        left, baseline = float(element.attrib["x"]) - shift * length, float(element.attrib["y"])
        assert left >= 0 and left + length <= width, element.text
        boxes.append((left, left + length, baseline - 0.75 * size, baseline + 0.2 * size, element.text))
    for number, (left, right, top, bottom, text) in enumerate(boxes):
        for other_left, other_right, other_top, other_bottom, other in boxes[number + 1 :]:
            apart = right <= other_left or other_right <= left or bottom <= other_top or other_bottom <= top
            assert apart, f"{text!r} lies over {other!r}"


def test_every_picture_is_shown() -> None:
    shown = {name for page in all_pages() for name in re.findall(r"pictures/([\w-]+)\.svg", page.text)}
    assert shown == {path.stem for path in PICTURES.glob("*.svg")}
