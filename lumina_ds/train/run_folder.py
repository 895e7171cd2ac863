"""The run folder: its paths and its lock."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError


class RunFolder:
    """runs/NAME/{config.yaml, ds_config.json, metrics.jsonl, metrics.csv, evaluations.jsonl, logs, checkpoints}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self._lock: IO[str] | None = None

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        return cls(Path(config.run.runs_dir) / config.run_name)

    def create(self) -> None:
        """Make the folder; ConfigError when it cannot be made or written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create the run folder {self.path}: {error.strerror}; set --runs-dir") from error

    def lock(self) -> None:
        """Hold the folder for this process; raises ConfigError when another run has it."""
        try:
            self._lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise ConfigError(
                f"the run folder {self.path} cannot be written: {error.strerror}; set --runs-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another run is training in {self.path}; wait for it, or choose another --experiment-name"
            ) from error

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
