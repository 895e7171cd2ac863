"""How messages write numbers and names, and users do: bytes, counts, shares, the nearest name to one mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MIB = 1 << 20
GIB = 1 << 30


def format_bytes(num_bytes: float) -> str:
    """Bytes in GiB, or in MiB below one: 13.14 GiB, 0.25 MiB."""
    size, unit = (GIB, "GiB") if num_bytes >= GIB else (MIB, "MiB")
    return f"{num_bytes / size:,.2f} {unit}"


def format_count(number: int) -> str:
    """A count as people say it: 501K, 69.8M, 7.06B, 15T."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        # What rounds to 1,000 of a unit is one of the next.
        if number >= 0.9995 * size:
            shown = number / size
            return f"{shown:,.0f}{letter}" if shown >= 999.5 else f"{shown:.3g}{letter}"
    return str(number)


def counted(number: int, one: str, several: str | None = None) -> str:
    """The number with its noun: 1 rank, 1,200 ranks. `several` is the plural where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def shortened(text: str, most: int = 80) -> str:
    """The text, or its beginning where it is longer than `most` characters, without line ends and other control
    characters: what stands in a message of one line."""
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint that names the closest candidate, or the empty string when none is close."""
    match = difflib.get_close_matches(name[:200], list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def with_article(noun: str) -> str:
    """The noun with a or an before it, as it sounds: an object, a list, a user."""
    return f"{'an' if noun.lower().startswith(('a', 'e', 'i', 'o', 'un')) else 'a'} {noun}"


def as_max_rejected(value: Any) -> Any:
    """A number of lines (int), or a share of them (float), also written as `5%`. Raises ValueError on anything else."""
    if isinstance(value, str):
        text = value.strip()
        value = float(f"{text[:-1].strip()}e-2") if text.endswith("%") else int(text) if text.isdigit() else float(text)
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError("a share of lines lies between 0 and 1 (0% and 100%); a number of lines has no point")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        raise ValueError("give a number of lines, or a share such as 0.05 or 5%")
    return value


def ranks_in_runs(ranks: Sequence[int]) -> str:
    """For a message: [3] is "rank 3", [8, 9, 10] is "ranks 8-10"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
