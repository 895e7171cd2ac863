"""What a check is given and what it says: Surroundings in, a Finding out."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warning", "fault"]
_PROGRAM_SECONDS = 2.0


@dataclass(frozen=True)
class Finding:
    """A line of the report. A fault is what keeps training from running; `details` are shown on request."""

    check: str
    level: Level
    says: str
    remedy: str = ""
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Surroundings:
    """Where to look; tests point it elsewhere."""

    runs_dir: Path = Path("runs")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    shared_memory: Path = Path("/dev/shm")
    verbose: bool = False
    _answers: dict[tuple[str, ...], tuple[int, str, str]] = field(default_factory=dict, repr=False)

    def find(self, program: str) -> str | None:
        """The program's path, searched in the PATH of this environment."""
        return shutil.which(program, path=self.environment.get("PATH", os.defpath))

    def run(self, command: Sequence[str], seconds: float = _PROGRAM_SECONDS) -> tuple[int, str, str]:
        """(exit status, stdout, stderr); 127 when it cannot be started, 124 when it takes too long.

        The same command is run once, however many checks ask: nvidia-smi may take seconds.
        """
        key = tuple(command)
        if key not in self._answers:
            self._answers[key] = self._run(command, seconds)
        return self._answers[key]

    def _run(self, command: Sequence[str], seconds: float) -> tuple[int, str, str]:
        program = self.find(command[0])
        if program is None:
            return 127, "", f"{command[0]} is not installed"
        try:
            done = subprocess.run(
                [program, *command[1:]],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                env=dict(self.environment),
            )
        except subprocess.TimeoutExpired:
            return 124, "", f"no answer within {seconds:g} seconds"
        except OSError as error:
            return 127, "", error.strerror or str(error)
        return done.returncode, done.stdout.strip(), done.stderr.strip()


def first_line(text: str) -> str:
    return text.splitlines()[0].strip() if text.strip() else ""
