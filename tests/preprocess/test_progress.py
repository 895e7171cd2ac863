"""Progress: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys

import pytest

from preprocess import progress
from preprocess.progress import show_progress


def test_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ticks = iter([0.0, 4.0, 11.0, 12.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    with show_progress(44_000_000) as display:
        display.update(4_000_000, 1_000)  # too early to speak
        display.update(22_000_000, 1_100_000)
        display.update(23_000_000, 1_200_000)  # too soon after the last line
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "preprocess: 20.98 MiB of 41.96 MiB, 11 s left, 1.91 MiB/s, 100,000 tokens/s\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show_progress(1 << 20) as display:
        display.update(1 << 20, 5_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1.0/1.0 MiB" in captured.err and "tokens/s" in captured.err
