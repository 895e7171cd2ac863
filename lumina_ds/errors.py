"""Typed errors of the whole package, each with the exit code that the command line returns.

A user's mistake raises one of these with a single sentence: what is wrong, the value, the remedy.
The command line prints that sentence and exits with the class's code; it never shows a traceback
for them. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# So many faults are listed; each may look for the nearest name, which takes its time.
MAX_FAULTS = 20

# All but the line ends of a list. Texts of libraries and of foreign files hold them.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]|\n(?!  )")


class LuminaError(Exception):
    """Base of every expected failure. `exit_code` is what the process returns.

    Its text is one line, or a first line and indented ones, whatever was put into it.
    """

    exit_code = 1

    def __str__(self) -> str:
        return _CONTROL.sub(lambda found: " " if found[0].isspace() else ascii(found[0])[1:-1], super().__str__())


class ConfigError(LuminaError):
    """A configuration or a command line that cannot be run."""

    exit_code = 2

    @classmethod
    def from_faults(cls, faults: Sequence[str], num_more: int = 0) -> ConfigError:
        """One error that lists every fault found, so that a user mends them in one go; of many, the first ones.

        `num_more` were found beside `faults`.
        """
        num_faults = len(faults) + num_more
        if num_faults == 1:
            return cls(faults[0])
        shown = [*faults[:MAX_FAULTS], *([f"and {num_faults - MAX_FAULTS} more"] if num_faults > MAX_FAULTS else [])]
        return cls(f"{num_faults} faults:" + "".join(f"\n  - {fault}" for fault in shown))


class DataError(LuminaError):
    """Input data that is missing, unreadable, or does not fit the tokenizer or the model."""

    exit_code = 3


class MachineError(LuminaError):
    """The machine lacks something that was asked for: a GPU feature, a library, disk space."""

    exit_code = 4


class SharedFault(MachineError):
    """What one rank found out about all of them and told to all: rank 0 alone prints it."""


class CheckpointError(LuminaError):
    """A checkpoint that is missing, damaged, or belongs to another model or layout."""

    exit_code = 5


class OutOfMemory(LuminaError):
    """The device ran out of memory."""

    exit_code = 6


class UnstableError(LuminaError):
    """Training became non-finite or diverged."""

    exit_code = 7


class StalledError(LuminaError):
    """A rank made no progress for too long."""

    exit_code = 8


class Interrupted(LuminaError):
    """Ended by a signal after saving; starting again resumes (EX_TEMPFAIL)."""

    exit_code = 75
