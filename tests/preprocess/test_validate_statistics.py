"""Distributions, histograms, duplicates and visible text, against values worked out by hand or by plain Python."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from lumina_ds.data.conversation import Turn
from lumina_ds.report.data.distribution import Bin, Distribution
from lumina_ds.report.data.visible import excerpt, visible
from preprocess.validation.console import bar, histogram_lines
from preprocess.validation.duplicates import DuplicateFinder


def test_distribution_by_hand() -> None:
    shown = Distribution([1, 1, 2, 4, 10])
    assert (shown.count, shown.sum, shown.mean, shown.minimum, shown.maximum) == (5, 18, 3.6, 1, 10)
    assert [shown.percentile(p) for p in (1, 40, 50, 60, 80, 81, 100)] == [1, 1, 2, 2, 4, 10, 10]
    assert shown.above(2) == (2, 2 + 8)
    assert shown.bins(20) == [Bin(n, n, {1: 2, 2: 1, 4: 1, 10: 1}.get(n, 0)) for n in range(1, 11)]
    # ten values in at most four bins: a step of 5, from a round border
    assert shown.bins(4) == [Bin(0, 4, 4), Bin(5, 9, 0), Bin(10, 14, 1)]


def test_distribution_of_large_values() -> None:
    values = [int(2 ** random.Random(n).uniform(0, 32)) for n in range(3000)]
    shown = Distribution(values[:1000])
    shown.add(np.array(values[1000:]))
    ordered = sorted(values)
    assert (shown.sum, shown.minimum, shown.maximum) == (sum(values), ordered[0], ordered[-1])
    for percent in (5, 25, 50, 75, 95, 99):
        assert shown.percentile(percent) == pytest.approx(ordered[-(-3000 * percent // 100) - 1], rel=1e-3)
    for limit in (1024, 4096, 1 << 20):
        count, excess = shown.above(limit)
        assert excess == pytest.approx(sum(max(0, value - limit) for value in values), rel=1e-3)
        assert count == pytest.approx(sum(value > limit for value in values), rel=1e-2)
    assert sum(b.count for b in shown.bins()) == 3000


def test_a_long_tail_goes_into_one_open_bin() -> None:
    bins = Distribution([*range(100), *range(100), 5000]).bins(10)
    assert bins[:2] == [Bin(0, 9, 20), Bin(10, 19, 20)]
    assert bins[-1] == Bin(100, 5000, 1, is_tail=True) and bins[-1].label == "100 and more"


def test_no_values_and_equal_values() -> None:
    assert (Distribution().bins(), Distribution().percentile(50), Distribution().mean) == ([], 0, 0)
    assert Distribution([7, 7]).bins() == [Bin(7, 7, 2)]


def test_bars() -> None:
    assert (bar(1, 4), bar(0.5, 4), bar(0, 4), bar(1e-9, 4)) == ("████", "██", "", "▏")
    assert bar(0.28, 4) == "█▏"  # 8.96 eighths
    assert (bar(0.5, 4, ascii_only=True), bar(1e-9, 4, ascii_only=True)) == ("##", "#")
    # 32 cells: 8 for the label, 12 for the bar, 1 for the count, 7 for the share, 4 between
    assert list(histogram_lines([Bin(0, 9, 3), Bin(10, 19, 1)], 32)) == [
        "  0 to 9  ████████████ 3   75.0%",
        "10 to 19  ████         1   25.0%",
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ~", "plain ~"),
        ("naïve 日本 👩", "naïve 日本 👩"),
        ("a\x00b\x1b[31m\x7f\n\t", "a␀b␛[31m␡⏎⇥"),
        ("\x85\u202e\u200b\u2028\ud800\ue000", "\\u{0085}\\u{202E}\\u{200B}\\u{2028}\\u{D800}\\u{E000}"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_excerpt_stands_around_its_place() -> None:
    text = "a" * 100 + "X" + "b" * 100
    assert excerpt(text, length=10) == "a" * 10 + "…"
    assert excerpt(text, 100, length=9) == "…aaaXbbbbb…"
    assert excerpt(text, 200, length=9) == "…bbbb"
    assert excerpt("short") == "short"


@pytest.mark.parametrize("records_per_run", [1 << 17, 64, 7])
def test_duplicates_are_those_of_a_dictionary(records_per_run: int) -> None:
    """The same in memory and through runs on disk."""
    generator = random.Random(1)
    texts = [str(int(generator.expovariate(0.01))) for _ in range(1000)]
    counts = Counter(texts)
    with DuplicateFinder(records_per_run) as finder:
        for number, text in enumerate(texts):
            finder.add((Turn("user", text), Turn("assistant", "yes")), number % 2, number)
        num_duplicates, repeats = finder.repeats(4)
    assert num_duplicates == 1000 - len(counts)
    assert [repeat.times for repeat in repeats] == [count for _, count in counts.most_common(4)]
    for repeat in repeats:
        lines = [number for number, text in enumerate(texts) if f"user: {text}  assistant: yes" == repeat.excerpt]
        expected = sorted((number % 2, number) for number in lines)[:4]
        assert (repeat.times, repeat.places) == (len(lines), expected)


def test_roles_and_borders_of_turns_count() -> None:
    with DuplicateFinder() as finder:
        for line, turns in enumerate(
            [
                (Turn("user", "ab"), Turn("assistant", "c")),
                (Turn("user", "a"), Turn("assistant", "bc")),
                (Turn("assistant", "ab"), Turn("user", "c")),
                (Turn("user", "ab"), Turn("assistant", "c"), Turn("user", "d")),
            ]
        ):
            finder.add(turns, 0, line)
        assert finder.repeats(3) == (0, [])


def test_no_conversations() -> None:
    with DuplicateFinder() as finder:
        assert finder.repeats(3) == (0, [])
