"""How messages write bytes, counts and near names."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
from source_tree import modules, tree

from lumina_ds.text import counted, format_bytes, format_count, nearest, with_article

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0.00 MiB"), (262_144, "0.25 MiB"), (2**30 - 1, "1,024.00 MiB"), (2**30, "1.00 GiB"), (2e12, "1,862.65 GiB")],
)
def test_bytes_are_binary(num_bytes: float, shown: str) -> None:
    assert format_bytes(num_bytes) == shown


def test_counts_have_short_forms_and_nouns() -> None:
    assert [format_count(number) for number in (999, 501_000, 7_060_000_000, 15 * 10**12)] == [
        "999",
        "501K",
        "7.06B",
        "15T",
    ]
    assert [counted(number, "rank") for number in (0, 1, 1200)] == ["0 ranks", "1 rank", "1,200 ranks"]
    assert counted(1, "conversation is", "conversations are") == "1 conversation is"
    assert counted(2, "conversation is", "conversations are") == "2 conversations are"


def test_the_nearest_name_is_a_hint_or_nothing() -> None:
    assert nearest("zero_optimisation", ["zero_optimization", "optimizer"]) == "; did you mean zero_optimization?"
    assert nearest("x", ["zero_optimization"]) == ""


def test_no_other_module_turns_bytes_into_text() -> None:
    """A unit of bytes after a formatted number belongs to text.py; gpus are sold in GB, which stays."""
    written = re.compile(r"""\{[^{}]*(?:1e6|1e9|2 ?\*\* ?[23]0|<< ?[23]0|GIB|MIB)[^{}]*\} ?(?:[MG]i?B)""")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for package in ("lumina_ds", "preprocess", "launch")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "text.py"
        for match in written.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_an_article_fits_the_word_that_is_inserted() -> None:
    assert [with_article(word) for word in ("object", "assistant", "int", "list", "user", "unknown", "tool")] == [
        "an object", "an assistant", "an int", "a list", "a user", "an unknown", "a tool",
    ]  # fmt: skip
    # Words that all begin alike, and no word.
    known = {"kind", "_NAMED[separator]", "flag", "' b '.join(some)"}
    before = re.compile(r"(^|\W)[Aa]n? ['\"]?$")
    found = {
        ast.unparse(value.value)
        for path in modules().values()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.JoinedStr)
        for text, value in pairwise(node.values)
        if isinstance(text, ast.Constant) and isinstance(value, ast.FormattedValue) and before.search(text.value)
    }
    assert found <= known, f"use with_article for {found - known}"
