"""The table of the keys that DeepSpeed reads from its JSON, keys.txt: kind, range, values, and what we do with each.

DeepSpeed ignores unknown keys at the top level, so a typo there changes a run silently. The table is written out, not
imported, because reading it must not cost the import of deepspeed. It says about the data sections, which DeepSpeed
reads key by key where they are used, what a typo in them would show late, or never.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TABLE = Path(__file__).with_name("keys.txt")


@dataclass(frozen=True)
class Key:
    """One key of a section. `low` and `high` bound a number; `choices` are the texts that it may be, in lower case;
    `role` is run, ours, unplanned or empty, as keys.txt explains; `removed` says what replaces a key that DeepSpeed refuses."""

    kind: str
    low: float | None = 0
    high: float | None = None
    choices: tuple[str, ...] = ()
    role: str = ""
    removed: str = ""


Section = dict[str, Key]


@dataclass(frozen=True)
class Table:
    """`sections` by dotted path, "" for the top level; `optimizers` and `schedulers` are the arguments by type, in lower
    case and as written; DeepSpeed takes another optimizer from torch.optim, another scheduler from torch."""

    sections: dict[str, Section]
    optimizers: dict[str, Section]
    schedulers: dict[str, Section]

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """Dotted path of a text to the values that DeepSpeed takes."""
        return {
            f"{path}.{name}" if path else name: key.choices
            for path, section in self.sections.items()
            for name, key in section.items()
            if key.choices
        }

    @property
    def ranges(self) -> dict[str, tuple[float | None, float | None]]:
        """Bounds by the key's name, which are the same in every section."""
        every = (*self.sections.values(), *self.optimizers.values(), *self.schedulers.values())
        return {name: (key.low, key.high) for section in every for name, key in section.items()}


@cache
def table() -> Table:
    """keys.txt, read once per process."""
    found = Table({}, {}, {})
    for title, section in _sections():
        path, _, types = title.partition(" of ")
        for name in (types or path).split(", "):
            place = {"optimizer.params": found.optimizers, "scheduler.params": found.schedulers} if types else {}
            place.get(path, found.sections)[name] = section
    return found


OPTIMIZER_TYPES = (
    *("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD"),
    *("Adadelta", "Adafactor", "Adamax", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
)


def _sections() -> Iterator[tuple[str, Section]]:
    section: Section = {}
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = {}
            yield line.strip("[]"), section
        elif line and not line.startswith("#"):
            name, kind, *notes = line.split()
            section[name] = Key(kind, removed=" ".join(notes)) if kind == "removed" else _key(kind, notes)


def _key(kind: str, notes: list[str]) -> Key:
    role = next((note for note in notes if note in ("run", "ours", "unplanned")), "")
    choices = next((tuple(note.split("|")) for note in notes if "|" in note), ())
    low = None if "signed" in notes else 1 if ">=1" in notes else 0
    return Key(kind, low, 1 if "<=1" in notes else None, choices, role)
