"""Plots: places worked out by hand, the image format read by a decoder of its own."""

from __future__ import annotations

import base64
import re
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest

from lumina_ds.report.heat_map import heat_image
from lumina_ds.report.line_plot import Line, LinePlot, line_figure, line_svg, sparkline
from lumina_ds.report.plot import round_step
from lumina_ds.report.scale import Point, label, spans_decades


def points(*values: float) -> list[Point]:
    return [Point(step, step, value, value, value) for step, value in enumerate(values)]


def element(plot: LinePlot, is_log: bool = False) -> ET.Element:
    return ET.fromstring(line_svg(plot, is_log=is_log))


def drawn(plot: LinePlot) -> ET.Element:
    return ET.fromstring(line_figure(plot).replace("class=muted", 'class="muted"').replace(" checked", ' checked=""'))


@pytest.mark.parametrize(
    ("smallest", "step"),
    [(1, 1), (1.1, 2), (3, 5), (5.5, 10), (10, 10), (0.03, 0.05), (0.06, 0.1), (0.001, 0.001), (7e-6, 1e-5)],
)
def test_round_steps(smallest: float, step: float) -> None:
    assert round_step(smallest) == step


def test_a_line_runs_from_corner_to_corner() -> None:
    plot = element(LinePlot("Loss", [Line("training", points(0, 1, 2, 3, 4))]))
    [line] = plot.findall("polyline")
    places = [tuple(float(n) for n in place.split(",")) for place in line.attrib["points"].split()]
    # The frame is 736 x 240 with margins 64, 16, 24, 46; values 0 to 4 fill it in round steps of 1.
    assert places == [(64, 194), (228, 151.5), (392, 109), (556, 66.5), (720, 24)]
    assert [text.text for text in plot.findall("text")] == ["0", "1", "2", "3", "4", "0", "1", "2", "3", "4", "step"]


def test_bands_appear_with_spread_only() -> None:
    assert element(LinePlot("x", [Line("x", points(1, 2))])).find("polygon") is None
    spread = [Point(0, 1, 1.5, 1, 2), Point(2, 3, 2, 1, 3)]
    assert element(LinePlot("x", [Line("x", spread)])).find("polygon") is not None


def test_a_logarithmic_height_has_round_values_around_all_points() -> None:
    decades = element(LinePlot("Norm", [Line("norm", points(0.1, 1, 10, 100))]), is_log=True)
    labels = [text.text for text in decades.findall("text")]
    assert labels == ["0.1", "1", "10", "100", "0", "1", "2", "3", "step (logarithmic height)"]
    # Equal ratios are equally high: 170 from floor to top over three decades.
    heights = [float(place.split(",")[1]) for place in decades.find("polyline").attrib["points"].split()]  # type: ignore[union-attr]
    assert heights == [194, 137.3, 80.7, 24]
    near = element(LinePlot("Loss", [Line("loss", points(2.1, 9))]), is_log=True)
    assert [text.text for text in near.findall("text")][:3] == ["2", "5", "10"]


@pytest.mark.parametrize(
    ("values", "is_on"), [((2.0, 10.0), False), ((0.1, 10.0), True), ((0.0, 10.0), None), ((-1.0, 10.0), None)]
)
def test_a_reader_switches_the_height_where_values_allow_it(values: tuple[float, ...], is_on: bool | None) -> None:
    plot = LinePlot("Norm", [Line("norm", points(*values))], may_be_log=True)
    assert spans_decades(plot.points) is is_on
    switch = drawn(plot).find("div[@class='heights']/label/input")
    assert (None if switch is None else "checked" in switch.attrib) is is_on
    axes = [text.text for text in drawn(plot).iter("text") if text.text and text.text.startswith("step")]
    # Each height in a wide and a narrow frame.
    assert axes == (["step"] * 2 if is_on is None else ["step"] * 2 + ["step (logarithmic height)"] * 2)
    assert drawn(LinePlot("Norm", plot.lines)).find(".//input") is None


def test_a_small_screen_gets_a_plot_of_its_own() -> None:
    """Labels shrink with the frame: 12 units are 6 pixels where 736 units have 380 pixels."""
    wide, narrow = drawn(LinePlot("Loss", [Line("loss", points(1, 2))])).findall("div")
    assert (wide.attrib["class"], narrow.attrib["class"]) == ("wide", "narrow")
    assert [each.find("svg").attrib["viewBox"] for each in (wide, narrow)] == ["0 0 736 240", "0 0 440 200"]  # type: ignore[union-attr]
    assert len(drawn(LinePlot("Loss", [Line("loss", points(1, 2))], is_wide=False)).findall(".//svg")) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00012, "0.00012"), (999.5, "999.5"), (40000, "40,000"), (1.25e6, "1.25M"), (-2e9, "-2B")],
)
def test_labels_are_short(value: float, text: str) -> None:
    assert label(value) == text


@pytest.mark.parametrize("values", [(2.5,), (0, 0), (-3, -3), (1e-30, 2e-30), (1e300, -1e300), (5e9, 5e9 + 1)])
def test_awkward_values_stay_in_the_frame(values: tuple[float, ...]) -> None:
    plot = element(LinePlot("x", [Line("x", points(*values))]))
    heights = [float(place.split(",")[1]) for place in plot.find("polyline").attrib["points"].split()]  # type: ignore[union-attr]
    assert all(24 <= y <= 194 for y in heights)


def test_names_are_escaped() -> None:
    assert "<b>" not in line_figure(LinePlot("<b>", [Line("<b>", points(1, 2), dots=True), Line("<b>", points(2))]))


def test_nothing_recorded_says_so() -> None:
    assert "Nothing was recorded" in line_figure(LinePlot("Loss", [Line("training", [])]))
    assert sparkline([], "loss") == ""


def test_heat_images_are_png_with_one_pixel_per_cell() -> None:
    loads = np.array([[0.0, 1.0, 2.0], [0.5, 1.5, 9.0]])
    image = heat_image(loads, 'layer "0"', 48)
    data = base64.b64decode(re.search(r"base64,([^\"]+)", image)[1])  # type: ignore[index]
    chunks, place = {}, 8
    while place < len(data):
        size = struct.unpack(">I", data[place : place + 4])[0]
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], place = body, place + 12 + size
    assert list(chunks) == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    rows = zlib.decompress(chunks[b"IDAT"])
    # One filter byte, then 1 + load * 127 rounded to even, loads above 2 as 2.
    assert list(rows) == [0, 1, 128, 255, 0, 64, 192, 255]
    assert chunks[b"tRNS"][128] == 0 and chunks[b"tRNS"][255] == 255
    assert "&quot;0&quot;" in image
