"""Names of keys that mean nothing here, and how often each stands: bounded whatever the input holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lumina_ds.foreign_files import shorten

MAX_NAMES = 1000
MAX_NAME_CHARACTERS = 100
# Counts what is found of more names than are kept.
OTHER_NAMES = "other names"
_MOST_NAMED = 20


def add_other_keys(counts: Counter[str], found: Mapping[str, int]) -> None:
    """Add what one block holds to `counts`, which keeps the first MAX_NAMES names.

    `found` is taken by name, not in the order of its sets, so that equal blocks in equal order keep equal names.
    """
    for name in sorted(found):
        kept = name[:MAX_NAME_CHARACTERS]
        is_full = len(counts) - (OTHER_NAMES in counts) >= MAX_NAMES
        counts[OTHER_NAMES if is_full and kept not in counts else kept] += found[name]


def describe_other_keys(counts: Mapping[str, int]) -> str:
    """Names of keys that mean nothing here and the number of places where each stands, the most frequent first."""
    listed = sorted(counts.items(), key=lambda item: (item[0] == OTHER_NAMES, -item[1], item[0]))
    shown = ", ".join(f"{shorten(name)[1:-1]} {count:,}" for name, count in listed[:_MOST_NAMED])
    more = len(listed) - _MOST_NAMED
    return f"{shown} and {more:,} more names (ignored)" if more > 0 else f"{shown} (ignored)"
